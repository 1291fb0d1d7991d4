package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
)

// Bounds of the matrix.
const (
	pressureLimit = 6 * time.Minute  // after the volume has room again: the kubelet takes five to believe it
	settleLimit   = 2 * time.Minute  // for the node to be as before
	whyLimit      = 25 * time.Second // for the node to notice what is wrong: kubeletd looks every ten seconds, storaged at volumes every five
)

// A blow is one row: what is done to whom, and what has to be seen.
type blow struct {
	name      string
	excused   []string // daemons that need not answer meanwhile; all others have to
	strike    func(t *testing.T, n *node)
	lasts     time.Duration // how long it is left so
	relieve   func(t *testing.T, n *node)
	why       []string // all of them in what "bhctl why" says, while it lasts or, if nothing is excused, just afterwards
	named     []string // daemons of which a caller hears meanwhile that they do not answer
	meanwhile func(t *testing.T, n *node)
	calm      time.Duration // how long the node must be as before to have settled
}

// testFaults looks at every process of a node from outside, and then has each daemon killed, stopped, out of memory, out of room, flooded, and without what it
// depends on: the others answer in their time, a pod goes on serving, "bhctl why" names the cause, and afterwards everything is as before. See docs/faults.md.
func testFaults(t *testing.T, n *node) {
	n.login = n.credentials(t)
	n.run(t, "bhctl", "health", "--wait=2m")
	// In place of the pods of a step before, if it was done: where a disk is full the kubelet evicts what is not critical, by design.
	if _, err := n.try(t.Context(), 2*time.Minute, "kubectl", "delete", "--ignore-not-found", "-f", filepath.Join(n.root, "test/machine/testdata/hello.yaml")); err != nil {
		t.Fatal(err)
	}
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/matrix.yaml"))
	eventually(t, 4*time.Minute, "pod answers on its NodePort", func() error { return n.ask(t.Context()) })
	if n.observed(t)[1].Name == "" {
		t.Fatal("the observer does not see PID 1")
	}
	t.Run("confinement", func(t *testing.T) { testConfinement(t, n) })
	before := n.stand(t)
	for what, state := range before {
		t.Logf("before, %s: %.300s", what, state)
	}
	var a askers
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan bool)
	go func() { a.run(ctx, n.askers(t)); close(done) }()
	rest := sync.OnceFunc(func() { stop(); <-done; a.report(t) })
	defer rest()
	start, rows := time.Now(), 0
	for _, f := range blows() {
		t.Run(f.name, func(t *testing.T) {
			if only := os.Getenv("BULKHEAD_MATRIX"); !strings.Contains(f.name, only) {
				t.Skipf("only rows with %q in their names were asked for", only)
			}
			rows++
			n.suffer(t, &a, f, before)
		})
		if t.Context().Err() != nil {
			break
		}
	}
	eventually(t, pressureLimit, "the kubelet tells of no pressure any more", func() error {
		now, err := n.standing(t.Context())
		if err == nil {
			err = standing{"pressure": before["pressure"]}.same(now)
		}
		return err
	})
	t.Logf("» %d faults of %d in %s", rows, len(blows()), time.Since(start).Round(time.Second))
	rest()
	t.Run("the workload side killed", func(t *testing.T) { testKillWorkload(t, n) }) // the pod too
}

// suffer is one row.
func (n *node) suffer(t *testing.T, a *askers, f blow, before standing) {
	a.excuse(f.excused...)
	defer func() { // also if it does not settle: what failed in this row is no other row's
		a.excuse()
		for _, e := range a.takeFailed() {
			t.Errorf("not answered: %s", e)
		}
	}()
	start := time.Now()
	f.strike(t, n)
	relieved := false
	relieve := func() {
		if !relieved && f.relieve != nil {
			f.relieve(t, n)
		}
		relieved = true
	}
	defer relieve() // a row that failed leaves nothing for the next
	if len(f.why) > 0 {
		eventually(t, whyLimit, "why names the cause", func() error {
			text, err := n.try(t.Context(), 15*time.Second, "bhctl", "--timeout", "10s", "why")
			if err != nil {
				text += err.Error()
			}
			flat := strings.Join(strings.Fields(text), " ") // it is broken into lines
			for _, want := range f.why {
				if !strings.Contains(flat, want) {
					return fmt.Errorf("%q is not in\n%s", want, text)
				}
			}
			return nil
		})
	}
	if f.meanwhile != nil {
		f.meanwhile(t, n)
	}
	if err := hold(t.Context(), f.lasts-time.Since(start)); err != nil {
		t.Fatal(err)
	}
	relieve()
	heard := a.hears()
	for _, who := range f.named {
		if !slices.ContainsFunc(heard[who], func(s string) bool { return strings.Contains(s, who+" has not answered for") }) {
			t.Errorf("no caller of %s heard that it does not answer: %q", who, heard[who])
		}
	}
	a.excuse()
	n.settle(t, before, f.calm)
	t.Logf("» %s in all", time.Since(start).Round(time.Second))
}

// settle waits until the node is as before, and stays so.
func (n *node) settle(t *testing.T, before standing, calm time.Duration) {
	t.Helper()
	since, last := time.Time{}, error(nil)
	defer func() {
		if last != nil {
			t.Logf("what took longest: %.400s", last.Error())
		}
	}()
	eventually(t, settleLimit, "as before", func() error {
		now, err := n.standing(t.Context())
		if err == nil {
			now["pressure"] = before["pressure"] // the kubelet's own inertia: see below
			if err = before.same(now); now["health"] != "" {
				err = errors.New(now["health"])
			}
		}
		if err != nil {
			since, last = time.Time{}, err
			return err
		}
		if since.IsZero() {
			since = time.Now()
		}
		if left := calm - time.Since(since); left > 0 {
			return fmt.Errorf("it is as before, and has to stay so for %s more", left.Round(time.Second))
		}
		return nil
	})
}

// askers make a call to each daemon, to the pod and to Kubernetes.
func (n *node) askers(t *testing.T) []asker {
	conn := n.connect(t)
	t.Cleanup(func() { conn.Close() })
	return []asker{
		{"machined", func(ctx context.Context) error {
			_, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
			return err
		}},
		{"apid", func(ctx context.Context) error {
			_, err := accessv1.NewAccessClient(conn).WhoAmI(ctx, &accessv1.WhoAmIRequest{})
			return err
		}},
		{"networkd", func(ctx context.Context) error {
			_, err := networkv1.NewNetworkClient(conn).GetStatus(ctx, &networkv1.GetStatusRequest{})
			return err
		}},
		{"storaged", func(ctx context.Context) error {
			_, err := storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
			return err
		}},
		{"trustd", func(ctx context.Context) error {
			_, err := trustv1.NewTrustClient(conn).ListCertificates(ctx, &trustv1.ListCertificatesRequest{})
			return err
		}},
		{"etcdd", func(ctx context.Context) error {
			_, err := etcdv1.NewEtcdClient(conn).GetStatus(ctx, &etcdv1.GetStatusRequest{})
			return err
		}},
		{"kubeletd", func(ctx context.Context) error {
			_, err := kubernetesv1.NewKubernetesClient(conn).GetStatus(ctx, &kubernetesv1.GetStatusRequest{})
			return err
		}},
		{"updated", func(ctx context.Context) error {
			_, err := updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
			return err
		}},
		{"gateway", n.openAPI},
		{"pod", n.ask},
	}
}
