package networkd

import (
	"net/netip"
	"path"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
)

// Spec is what networkd makes of its documents. The zero value is no spec; see bare.
type Spec struct {
	Hostname string
	Network  config.Network // Interfaces is never empty
	// Ports are the node's own (TCP), open to everybody unless a rule of the firewall names them.
	Ports []int
	// Pods is the subnet of the cluster's pods; the zero value: none yet.
	Pods netip.Prefix
	// Bridge is true with the built-in pod network: then no pod's packet comes in over a managed interface.
	Bridge bool
	// VirtualIPs are the cluster's addresses that this node may have for a time.
	VirtualIPs []netip.Addr
}

// The node's own ports.
const (
	portAPI       = 50000 // apid
	portGateway   = 50001
	portAPIServer = 6443
	portEtcdPeer  = 2380 // etcd members among themselves, with certificates of their own
	portKubelet   = 10250
)

// everyDevice is what an unconfigured network gets: a lease on each physical Ethernet interface.
var everyDevice = []config.Interface{{Name: "*", DHCP: true}}

// bare is what networkd works towards until machined sends a spec: the node can be reached, on its doors only.
func bare(hostname string) Spec {
	return Spec{Hostname: hostname, Network: config.Network{Interfaces: everyDevice}, Ports: []int{portAPI, portGateway}}
}

// parse reads networkd's sections. hostname is the name of a node whose document gives it none.
func parse(documents []byte, hostname string) (Spec, error) {
	set, err := config.Parse("spec", documents)
	if err != nil {
		return Spec{}, err
	}
	s := Spec{
		Hostname: set.Machine.Hostname, Network: *set.Network, Ports: []int{portAPI, portGateway, portKubelet},
		Pods: set.Kubernetes.PodSubnet, Bridge: set.Kubernetes.CNI == "bridge",
		VirtualIPs: set.Cluster.VirtualIPs,
	}
	if s.Hostname == "" {
		s.Hostname = hostname
	}
	if len(s.Network.Interfaces) == 0 {
		s.Network.Interfaces = everyDevice
	}
	if set.Machine.Role == config.ControlPlane {
		s.Ports = append(s.Ports, portAPIServer, portEtcdPeer)
	}
	return s, nil
}

// interfaceOf returns the entry for a link; nil if networkd has nothing to do with it. An exact name goes before a pattern, and
// a pattern means physical Ethernet only: bridges and veth pairs are made by others, for pods.
func (s Spec) interfaceOf(l Link) *config.Interface {
	if l.Loopback {
		return nil
	}
	var found *config.Interface
	for i := range s.Network.Interfaces {
		c := &s.Network.Interfaces[i]
		if c.Name == l.Name {
			return c
		}
		if found == nil && l.Physical && isPattern(c.Name) {
			if ok, err := path.Match(string(c.Name), string(l.Name)); err == nil && ok {
				found = c
			}
		}
	}
	return found
}

func isPattern(n config.LinkName) bool { return strings.Contains(string(n), "*") }
