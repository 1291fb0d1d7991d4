package kubeletd

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func TestNodeAddress(t *testing.T) {
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	route := func(iface, to, metric string) string {
		return iface + "\t" + to + "\t0202000A\t0003\t0\t0\t" + metric + "\t00000000\t0\t0\t0\n"
	}
	eth0 := link{"eth0", true, []netip.Addr{addr("fe80::1"), addr("10.0.2.15"), addr("10.0.2.99")}}
	eth1 := link{"eth1", true, []netip.Addr{addr("192.168.1.2")}}
	lo, cni := link{"lo", true, []netip.Addr{addr("127.0.0.1")}}, link{"cni0", true, []netip.Addr{addr("10.244.0.1")}}
	for _, c := range []struct {
		name, routes string
		links        []link
		want         string
	}{
		{"default route", head + route("eth1", "00000000", "0"), []link{lo, cni, eth0, eth1}, "192.168.1.2"},
		{"the better of two", head + route("eth1", "00000000", "200") + route("eth0", "00000000", "100"), []link{eth0, eth1}, "10.0.2.15"},
		{"none: the first that is no pod's", head, []link{lo, cni, eth0, eth1}, "10.0.2.15"},
		{"its interface has no address yet", head + route("eth2", "00000000", "0"), []link{eth0, {"eth2", true, nil}}, "invalid IP"},
		{"down", head, []link{{"eth0", false, eth0.addresses}}, "invalid IP"},
		{"nothing", "", nil, "invalid IP"},
		{"garbage", "a b c\n00000000 00000000 0 0 0 0 x 00000000\n", []link{eth0}, "10.0.2.15"},
	} {
		if got := nodeAddress(c.routes, c.links); got.String() != c.want {
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
