package kubeletd

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func TestNodeAddress(t *testing.T) {
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	route := func(iface string) string {
		return head + iface + "\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
	}
	link := func(name string, addresses ...string) nodeaddr.Link {
		l := nodeaddr.Link{Name: name, Up: true}
		for _, a := range addresses {
			l.Addresses = append(l.Addresses, netip.MustParsePrefix(a))
		}
		return l
	}
	eth0, eth1 := link("eth0", "fe80::1/64", "2001:db8::1/64", "10.0.2.15/24", "10.0.2.99/24"), link("eth1", "10.5.0.11/24")
	both := []nodeaddr.Link{link("lo", "127.0.0.1/8"), link("cni0", "10.244.0.1/24"), eth0, eth1}
	for _, c := range []struct {
		name, routes         string
		links                []nodeaddr.Link
		seen, last, endpoint string
		want                 string
	}{
		{"default route", route("eth1"), both, "", "", "", "10.5.0.11"},
		{"none: the first that is no pod's", head, both, "", "", "", "10.0.2.15"},
		{"the endpoint's subnet", route("eth0"), both, "", "", "10.5.0.100", "10.5.0.11"},
		{"where the cluster has seen it", route("eth0"), both, "10.5.0.11", "", "", "10.5.0.11"},
		{"it stays", route("eth0"), both, "", "10.0.2.99", "", "10.0.2.99"},
		{"its interface has no address yet", route("eth2"), []nodeaddr.Link{eth0, link("eth2")}, "", "", "", "invalid IP"},
		{"its interface has no address yet, and does not matter", route("eth2"), []nodeaddr.Link{eth0, eth1, link("eth2")}, "", "", "10.5.0.1", "10.5.0.11"},
		{"down", head, []nodeaddr.Link{{Name: "eth0", Addresses: eth0.Addresses}}, "", "", "", "invalid IP"},
		{"nothing", "", nil, "", "", "", "invalid IP"},
	} {
		var last, endpoint netip.Addr
		for a, text := range map[*netip.Addr]string{&last: c.last, &endpoint: c.endpoint} {
			if text != "" {
				*a = addr(text)
			}
		}
		if got := nodeAddress(c.routes, c.links, nodeaddr.Parse([]string{c.seen}), last, endpoint); got.String() != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers("# x\nnameserver 127.0.0.53\nnameserver 10.0.2.3\nnameserver fe80::1%eth0\nsearch a\nnameserver ::1\nnameserver x\nnameserver 2001:db8::1\n")
	if len(got) != 2 || got[0] != addr("10.0.2.3") || got[1] != addr("2001:db8::1") {
		t.Errorf("got %v", got)
	}
}

func TestDisk(t *testing.T) {
	d := disk{t.TempDir(), func(uid.ID) int { return os.Getgid() }}
	secret, public := File{Path: "kubernetes/kube-apiserver/args", Group: uid.KubeAPIServer}, File{Path: "kubernetes/pki/ca.pem", Public: true}
	for _, f := range []File{secret, public} {
		if _, ok, err := d.read(f); ok || err != nil {
			t.Fatalf("%s: there before it was written (%v)", f.Path, err)
		}
		for range 2 {
			if err := d.write(f, []byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if got, ok, err := d.read(f); !ok || err != nil || got != seal(f, digest([]byte("x"))) {
			t.Errorf("%s: %s, %v, want %s", f.Path, got, err, seal(f, digest([]byte("x"))))
		}
	}
	for path, want := range map[string]os.FileMode{"kubernetes": 0o755, "kubernetes/kube-apiserver": 0o750, "kubernetes/pki": 0o755, secret.Path: 0o640, public.Path: 0o644} {
		if fi, err := os.Stat(filepath.Join(d.dir, path)); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %o", path, fi.Mode(), err, want)
		}
	}
	if err := os.Chmod(filepath.Join(d.dir, secret.Path), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, _, err := d.read(secret); err != nil || got == seal(secret, digest([]byte("x"))) {
		t.Errorf("a secret that everybody may read counts as in place: %s, %v", got, err)
	}
	if err := d.setStamp("kubelet", "abc"); err != nil {
		t.Fatal(err)
	}
	if s, err := d.stamps([]string{"kubelet", "containerd"}); err != nil || s["kubelet"] != "abc" || s["containerd"] != "" {
		t.Errorf("stamps %v, %v", s, err)
	}
	for range 2 {
		if err := d.remove(secret.Path); err != nil {
			t.Error(err)
		}
	}
}
