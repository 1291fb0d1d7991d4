package kubeletd

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// What speaks to containerd is started when that listens, not when it merely runs.
func TestImagesWaitForContainerd(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	w := newWorld(t, ca, newAPIServer(t, ca), clusterNode("w1", "worker", "10.5.0.101"))
	w.mute = true
	var listening atomic.Bool
	early, loaded := make(chan string, 16), make(chan bool, 16)
	w.start = func(unit string) {
		if unit != "workload" && unit != "containerd" && !listening.Load() {
			early <- unit
		}
		if unit == "image-load" {
			loaded <- true
		}
	}
	d := w.run(workerDocument)
	w.until(d, "the status says what it waits for", func() bool {
		st, _ := d.status.Get()
		return slices.ContainsFunc(st.GetComponents(), func(c *kubernetesv1.Component) bool {
			return c.GetName() == "containerd" && c.GetState() == "up" && !c.GetHealthy() && strings.HasPrefix(c.GetDetail(), "nobody listens at ")
		})
	})
	listening.Store(true)
	w.listen()
	select {
	case <-loaded:
	case <-time.After(30 * time.Second):
		t.Error("the images were never loaded")
	}
	select {
	case unit := <-early:
		t.Errorf("%s was started before containerd listened", unit)
	default:
	}
}

// Of the kernel's table only a socket that accepts connections counts, at that very path.
func TestListens(t *testing.T) {
	const table = "Num       RefCount Protocol Flags    Type St Inode Path\n" +
		"0000000000000000: 00000003 00000000 00000000 0001 03 20 /run/a.sock\n" + // a connection that came in there
		"0000000000000000: 00000002 00000000 00010000 0001 01 21 /run/a.sock.ttrpc\n" +
		"0000000000000000: 00000002 00000000 00010000 0001 01 22\n" +
		"0000000000000000: 00000002 00000000 00010000 0001 01 23 /run/b.sock\n"
	for path, want := range map[string]bool{"/run/a.sock": false, "/run/b.sock": true, "b.sock": false, "": false} {
		if got := listens(table, path); got != want {
			t.Errorf("%q: %v, want %v", path, got, want)
		}
	}
}

// The API server calls itself by the kernel's host name: it is not started before that is the node's, or several would share one lease.
func TestHostnameFirst(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	api := newAPIServer(t, ca)
	w := newWorld(t, ca, api, clusterNode("cp", "controlplane", "127.0.0.1"))
	w.nameless = true
	started := make(chan string, 16)
	w.start = func(unit string) {
		if strings.HasPrefix(unit, "kube") {
			name, _ := w.hostname.Get()
			started <- unit + " as " + name
		}
	}
	d := w.run(controlPlaneDocument)
	w.until(d, "the status says what it waits for", func() bool {
		st, _ := d.status.Get()
		return st.GetApiReady() && slices.Contains(st.GetPending(), "wait for hostname") && !slices.ContainsFunc(st.GetPending(), func(p string) bool { return strings.HasPrefix(p, "write ") })
	})
	w.hostname.Set("cp")
	select {
	case got := <-started:
		if !strings.HasSuffix(got, " as cp") {
			t.Errorf("started: %s", got)
		}
	case <-time.After(30 * time.Second):
		t.Error("nothing was started")
	}
}
