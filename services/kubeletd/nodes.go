package kubeletd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// memberKey is the label of Nodes that are Bulkhead's. Only those are deleted when their node is removed from the cluster.
const memberKey = "bulkhead.dev/member"

const (
	nodesPage = 200 // Nodes in one answer: with their lists of images they take 20 KiB each
	// strangerTime is for how long a Node must have belonged to no member before it is deleted: the list of members may lag behind for seconds.
	strangerTime = 30 * time.Second
)

// Peer is what matters of a Node, this one's or another's.
type Peer struct {
	UID     string
	Created string       // RFC 3339, so that the order of texts is that of time
	PodCIDR netip.Prefix // zero until allocated
	Address netip.Addr   // its InternalIP; zero if there is none
	Ours    bool         // it has the label memberKey
}

// nodeObject is the part of a Node that is read.
type nodeObject struct {
	Metadata struct {
		Name, UID, ResourceVersion, CreationTimestamp string
		Labels                                        map[string]string
	}
	Spec struct {
		PodCIDR string
		Taints  []struct{ Key, Effect string }
	}
	Status struct {
		Conditions []struct{ Type, Status, Reason, Message string }
		Addresses  []struct{ Type, Address string }
	}
}

// peer leaves out what cannot be read.
func (o nodeObject) peer() Peer {
	p := Peer{UID: o.Metadata.UID, Created: o.Metadata.CreationTimestamp}
	p.PodCIDR, _ = netip.ParsePrefix(o.Spec.PodCIDR)
	for _, a := range o.Status.Addresses {
		if a.Type == "InternalIP" && !p.Address.IsValid() {
			p.Address, _ = netip.ParseAddr(a.Address)
		}
	}
	_, p.Ours = o.Metadata.Labels[memberKey]
	return p
}

// followNodes calls set with all Nodes, now and after each change that matters, until the server ends it. Kubelets report often, and a list of a
// thousand Nodes is large: so it is read once and then followed.
func (c *cluster) followNodes(ctx context.Context, set func(map[string]Peer)) error {
	all, version := map[string]Peer{}, ""
	for next := ""; ; {
		var list struct {
			Metadata struct{ ResourceVersion, Continue string }
			Items    []nodeObject
		}
		q := url.Values{"limit": {fmt.Sprint(nodesPage)}}
		if next != "" {
			q.Set("continue", next)
		}
		if err := c.do(ctx, request{method: http.MethodGet, path: nodesPath, query: q}, &list); err != nil {
			return err
		}
		for _, o := range list.Items {
			all[o.Metadata.Name] = o.peer()
		}
		if version, next = list.Metadata.ResourceVersion, list.Metadata.Continue; next == "" {
			break
		}
	}
	set(maps.Clone(all))
	ctx, cancel := context.WithTimeout(ctx, watchTime+apiTime)
	defer cancel()
	resp, err := c.send(ctx, request{method: http.MethodGet, path: nodesPath, query: url.Values{
		"watch": {"1"}, "timeoutSeconds": {fmt.Sprint(int(watchTime / time.Second))}, "resourceVersion": {version}}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var e struct {
			Type   string
			Object nodeObject
		}
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return errs.New(errs.Unavailable, "watch %s: %w", nodesPath, err)
		}
		name, changed := e.Object.Metadata.Name, false
		switch e.Type {
		case "ADDED", "MODIFIED":
			p := e.Object.peer()
			changed = all[name] != p
			all[name] = p
		case "DELETED":
			delete(all, name)
			changed = true
		case "ERROR": // the version is too old, or the server has lost it: all is listed anew
			return errs.New(errs.Unavailable, "watch %s: the server has ended it", nodesPath)
		}
		if changed {
			set(maps.Clone(all))
		}
	}
}

// deleteNode deletes a Node, unless it is another one of its name by now.
func (c *cluster) deleteNode(ctx context.Context, name, uid string) error {
	return c.delete(ctx, nodePath(name), uid)
}

// delete deletes the one object that has the uid.
func (c *cluster) delete(ctx context.Context, path, uid string) error {
	body, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": map[string]string{"uid": uid}})
	if err != nil {
		return err
	}
	err = c.do(ctx, request{method: http.MethodDelete, path: path, body: body}, nil)
	if errs.Is(err, errs.NotFound) || errs.Is(err, errs.Conflict) {
		return nil // another control plane was first
	}
	return err
}

// strangers are Bulkhead's Nodes that belong to no member; none while the members are not known. It is pure.
func strangers(peers map[string]Peer, members map[string]Member) []string {
	var out []string
	for name, p := range peers {
		if _, ok := members[name]; !ok && p.Ours && len(members) > 0 {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// A podRoute leads to another node's pods.
type podRoute struct {
	Prefix netip.Prefix
	Via    netip.Addr
}

func (r podRoute) String() string { return r.Prefix.String() + " via " + r.Via.String() }

// podNetwork is what networkd must know of the pods; the zero value is nothing.
type podNetwork struct {
	Subnet, Local netip.Prefix
	Routes        []podRoute // sorted by prefix
}

func (n podNetwork) String() string {
	if !n.Local.IsValid() {
		return ""
	}
	out := []string{n.Local.String() + " of " + n.Subnet.String()}
	for _, r := range n.Routes {
		out = append(out, r.String())
	}
	return strings.Join(out, ", ")
}

// podNetworkOf decides the ways to other nodes' pods. A node's kubelet says of itself which its address is, and may put a subnet into its Node when
// it makes it. So an address counts only if the cluster has seen that node there, and a subnet only if it is one node's share of the pod subnet and no older
// Node has a part of it. It is pure.
//
// known is false while something is missing: after a start of kubeletd networkd still has what it was told before, and pods still reach each other by it.
func podNetworkOf(want spec, have State) (out podNetwork, known bool) {
	switch {
	case want.CNI != "bridge":
		return out, true
	case have.Node == nil || !have.Node.PodCIDR.IsValid() || have.Peers == nil || have.Members == nil:
		return out, false
	}
	out = podNetwork{Subnet: want.PodSubnet.Masked(), Local: have.Node.PodCIDR.Masked()}
	taken := []netip.Prefix{out.Local}
	names := slices.SortedFunc(maps.Keys(have.Peers), func(a, b string) int {
		return strings.Compare(have.Peers[a].Created+a, have.Peers[b].Created+b)
	})
	for _, name := range names {
		p := have.Peers[name]
		inside := p.PodCIDR.IsValid() && p.PodCIDR == p.PodCIDR.Masked() && out.Subnet.Contains(p.PodCIDR.Addr()) && p.PodCIDR.Bits() >= nodeMask(out.Subnet)
		if name == want.Node || !inside || slices.ContainsFunc(taken, p.PodCIDR.Overlaps) || !slices.Contains(have.Members[name].Addresses, p.Address) {
			continue
		}
		taken = append(taken, p.PodCIDR)
		out.Routes = append(out.Routes, podRoute{p.PodCIDR, p.Address})
	}
	slices.SortFunc(out.Routes, func(a, b podRoute) int { return a.Prefix.Compare(b.Prefix) })
	return out, true
}
