package machine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// A standing is how a node is, in texts that are the same whenever it is as it was: what must not be changed by a fault that is over.
type standing map[string]string

// same says in what another standing differs.
func (s standing) same(now standing) error {
	var all []error
	for what, was := range s {
		if now[what] == was {
			continue
		}
		old, is := strings.Split(was, "\n"), strings.Split(now[what], "\n")
		missing := slices.DeleteFunc(slices.Clone(old), func(l string) bool { return slices.Contains(is, l) })
		more := slices.DeleteFunc(is, func(l string) bool { return slices.Contains(old, l) })
		all = append(all, fmt.Errorf("%s: missing %q, new %q", what, missing, more))
	}
	return errors.Join(all...)
}

// stand is the standing of a node that must answer, once all its pods are ready.
func (n *node) stand(t *testing.T) (s standing) {
	t.Helper()
	eventually(t, 2*time.Minute, "the node tells how it is", func() (err error) {
		s, err = n.standing(t.Context())
		if err == nil && s["health"] != "" {
			err = errors.New(s["health"])
		}
		if err == nil && strings.Contains(s["pods"], " false}") {
			err = fmt.Errorf("not ready: %s", s["pods"])
		}
		return err
	})
	return s
}

// standing asks for everything.
func (n *node) standing(ctx context.Context) (standing, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.login)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var units, trouble, specs, net, volumes []string
	services, err := machinev1.NewMachineClient(conn).ListServices(ctx, &machinev1.ListServicesRequest{})
	for _, s := range services.GetServices() {
		units = append(units, s.Name+" "+s.State)
	}
	health, err2 := machinev1.NewMachineClient(conn).GetHealth(ctx, &machinev1.GetHealthRequest{})
	for _, c := range health.GetChecks() {
		if !c.Ok {
			trouble = append(trouble, c.Name+": "+c.Detail)
		}
	}
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	if len(trouble) > 0 { // the rest would only keep busy who is just starting
		return standing{"health": lines(trouble)}, nil
	}
	document, err3 := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
	list, err4 := configv1.NewConfigClient(conn).ListSpecs(ctx, &configv1.ListSpecsRequest{})
	for _, s := range list.GetSpecs() {
		specs = append(specs, fmt.Sprintf("%s generation %d converged %t %s", s.Daemon, s.Generation, s.Converged, s.Error))
	}
	network, err5 := networkv1.NewNetworkClient(conn).GetStatus(ctx, &networkv1.GetStatusRequest{})
	for _, l := range network.GetLinks() {
		net = append(net, fmt.Sprintf("link %s %s %s %d %t %t", l.Name, l.Kind, l.HardwareAddress, l.Mtu, l.Up, l.Carrier))
	}
	for _, a := range network.GetAddresses() {
		net = append(net, fmt.Sprintf("address %s %s %s", a.Link, a.Address, a.Origin))
	}
	for _, r := range network.GetRoutes() {
		net = append(net, fmt.Sprintf("route %s %s %s", r.GetDestination(), r.GetGateway(), r.GetLink()))
	}
	for _, r := range network.GetRules() {
		net = append(net, "rule "+r.GetText())
	}
	net = append(net, "hostname "+network.GetHostname(), fmt.Sprint("nameservers ", network.GetNameservers()))
	storage, err6 := storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
	for _, v := range storage.GetVolumes() {
		volumes = append(volumes, fmt.Sprintf("%s %s %s %s %s", v.Name, v.State, v.Device, v.Filesystem, v.Encryption))
	}
	mounts, err7 := n.observe(ctx, "GET", "mounts", "")
	kubernetes, err8 := n.try(ctx, 20*time.Second, "kubectl", "get", "nodes,pods", "-A", "-o", "json")
	pods, nodes, pressure, err9 := kubernetesLines(kubernetes)
	return standing{
		"services": lines(units), "health": lines(trouble), "specs": lines(specs), "network": lines(net), "volumes": lines(volumes), "mounts": mountLines(mounts),
		"pods": pods, "nodes": nodes, "pressure": pressure, "document": fmt.Sprintf("generation %d\n%s", document.GetGeneration(), document.GetDocuments()),
	}, errors.Join(err3, err4, err5, err6, err7, err8, err9)
}

func lines(l []string) string {
	slices.Sort(l)
	return strings.Join(l, "\n")
}

// kubernetesLines are what must stay of Kubernetes, read from a list of nodes and pods. That there is pressure on a disk stands apart.
func kubernetesLines(list string) (pods, nodes, pressure string, err error) {
	var l struct {
		Items []struct {
			Kind     string
			Metadata struct{ Name string }
			Spec     struct {
				Unschedulable bool
				Taints        []struct{ Key string }
			}
			Status struct {
				Phase, PodIP      string
				Conditions        []struct{ Type, Status string }
				ContainerStatuses []struct {
					ContainerID string
					Ready       bool
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(list), &l); err != nil {
		return "", "", "", fmt.Errorf("kubectl get nodes,pods: %w", err)
	}
	var p, n, d []string
	for _, i := range l.Items {
		name := i.Metadata.Name
		if i.Kind == "Pod" {
			p = append(p, fmt.Sprint(name, " ", i.Status.Phase, " ", i.Status.PodIP, " ", i.Status.ContainerStatuses))
			continue
		}
		n = append(n, fmt.Sprint(name, " unschedulable ", i.Spec.Unschedulable))
		d = append(d, fmt.Sprint(name, " taints ", i.Spec.Taints))
		for _, c := range i.Status.Conditions {
			if c.Type == "DiskPressure" {
				d = append(d, name+" DiskPressure "+c.Status)
			} else {
				n = append(n, name+" "+c.Type+" "+c.Status)
			}
		}
	}
	return lines(p), lines(n), lines(d), nil
}

// mountLines are the mounts without their numbers, which begin anew with each mount.
func mountLines(mountinfo string) string {
	var out []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if i := slices.Index(f, "-"); i > 5 && i+3 < len(f) {
			out = append(out, fmt.Sprintf("%s on %s %s, %s %s", f[i+2], f[4], f[5], f[i+1], f[i+3]))
		}
	}
	return lines(out)
}

// openAPI asks the gateway for what it has by itself.
func (n *node) openAPI(ctx context.Context) error {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(n.login.CA)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("https://localhost:%d/openapi.json", n.gatewayPort), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err = io.Copy(io.Discard, resp.Body); err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	return err
}

// A standing names what is gone and what is new.
func TestStandingDiffers(t *testing.T) {
	a, b := standing{"x": "one\ntwo", "y": "same"}, standing{"x": "one\nthree", "y": "same"}
	if err := a.same(a); err != nil {
		t.Error(err)
	}
	if err := a.same(b); err == nil || err.Error() != `x: missing ["two"], new ["three"]` {
		t.Errorf("got %v", err)
	}
	pods, nodes, pressure, err := kubernetesLines(`{"items": [{"kind": "Node", "metadata": {"name": "n"}, "spec": {"taints": [{"key": "k"}]}, "status": {"conditions": [{"type": "Ready", "status": "True"},
		{"type": "DiskPressure", "status": "False"}]}}, {"kind": "Pod", "metadata": {"name": "p"}, "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"containerID": "c", "ready": true}]}}]}`)
	if err != nil || pods != "p Running 10.0.0.1 [{c true}]" || nodes != "n Ready True\nn unschedulable false" || pressure != "n DiskPressure False\nn taints [{k}]" {
		t.Errorf("%q, %q, %q, %v", pods, nodes, pressure, err)
	}
	got := mountLines("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n")
	if got != "/dev/root on /mnt2 rw,noatime, ext3 rw,errors=continue" {
		t.Errorf("got %q", got)
	}
}
