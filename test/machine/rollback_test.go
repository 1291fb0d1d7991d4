package machine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// onlyRollback skips what is too long for "make test-vm".
func onlyRollback(t *testing.T) {
	t.Helper()
	if !rollback() {
		t.Skip("takes long: make test-rollback")
	}
}

// clustered is a node of a cluster of its own, that has its standard proofs.
const clustered = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: poisoned\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: poisoned\nnames: [localhost, 127.0.0.1]\n"

// TestRollbackKubernetes upgrades a node with Kubernetes to a good version, with which everything is as before, and then to versions of which one part of Kubernetes
// does not come back.
func TestRollbackKubernetes(t *testing.T) {
	onlyRollback(t)
	n := newNode(t)
	m := n.upFirmware(t, filepath.Join(n.root, "out/image"), clustered, 4096, 2)
	n.run(t, "bhctl", "kubeconfig", "--file", n.kubeconfig)
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/hello.yaml"))
	works := func(limit time.Duration) {
		t.Helper()
		eventually(t, limit, "the pod answers through its Service", func() error { return n.ask(t.Context()) })
		eventually(t, 2*time.Minute, "the node is Ready", func() error {
			out, err := n.try(t.Context(), 30*time.Second, "kubectl", "get", "nodes", "--no-headers")
			if err == nil && !strings.Contains(out, " Ready ") {
				err = fmt.Errorf("nodes: %s", out)
			}
			return err
		})
		if word := n.run(t, "kubectl", "get", "configmap", "kept", "-o", "jsonpath={.data.word}"); word != "bulkhead" {
			t.Errorf("what etcd kept is %q", word)
		}
	}
	works(6 * time.Minute)
	if !t.Run("a good version stays", func(t *testing.T) {
		generations := n.run(t, "bhctl", "get", "generations", "-o", "json")
		bundle := n.bundleOf(t, poison{}, "9.0.0", true)
		start := time.Now()
		if out, err := n.try(t.Context(), 30*time.Minute, "bhctl", "upgrade", "--image", bundle); err != nil || !strings.Contains(out, "9.0.0 runs and was found good") {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		t.Logf("» upgraded and found good after %s", time.Since(start).Round(time.Second))
		n.runs(t, "9.0.0", generations)
		works(4 * time.Minute)
	}) {
		t.FailNow()
	}
	document := filepath.Join(n.dir, "impatient.yaml")
	if err := os.WriteFile(document, []byte(clustered+"---\napiVersion: bulkhead.dev/v1\nkind: Update\npatience: 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.run(t, "bhctl", "apply", "-f", document)
	generations := n.run(t, "bhctl", "get", "generations", "-o", "json")
	for i, p := range clusterPoisons {
		if !t.Run(p.name, func(t *testing.T) {
			n.givesWay(t, m, p, n.bundleOf(t, p, version(i), true), version(i))
			n.runs(t, "9.0.0", generations)
			works(6 * time.Minute)
		}) {
			t.FailNow()
		}
	}
}

// goodUpgrades is how many follow one another, and maxCuts how often the power is cut in each after the new version was started: it has three tries.
const (
	goodUpgrades = 20
	maxCuts      = 2
)

// A life is a node that is upgraded again and again, with power cuts at random moments.
type life struct {
	n           *node
	m           qemu.Machine
	rnd         *rand.Rand
	generations string
	install     time.Duration // how long one takes without a cut
	trial       time.Duration // from power-on to good
	cuts        int
}

// TestRollbackFalse upgrades a node twenty times, while its power is cut during installations, trials, and about when a version is found good. No good version may be left.
func TestRollbackFalse(t *testing.T) {
	onlyRollback(t)
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("BULKHEAD_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("» BULKHEAD_SEED=%d repeats this", seed)
	n := newNode(t)
	var images []string
	for i := range 3 {
		images = append(images, n.build(t, otherImage{version: version(i)}))
	}
	l := &life{n: n, rnd: rand.New(rand.NewPCG(seed, 0)), m: n.upFirmware(t, images[0], provedBy, 2048, secureCPUs, "--no-bootstrap")}
	l.generations = n.run(t, "bhctl", "get", "generations", "-o", "json")
	upgrades := goodUpgrades
	if hasty() {
		upgrades = 4
	}
	for i := 1; i <= upgrades; i++ {
		to := i % len(images)
		start := time.Now()
		before := l.cuts
		cuts, early := l.rnd.IntN(maxCuts+1), l.rnd.IntN(2)
		if i == 1 { // shows how long each part takes here
			cuts, early = 0, 0
		}
		l.upgrade(t, images[to], version(to), early, cuts)
		t.Logf("» upgrade %d, to %s: good after %s, with %d cuts", i, version(to), time.Since(start).Round(time.Second), l.cuts-before)
	}
	t.Logf("» %d upgrades with %d cuts: all good", upgrades, l.cuts)
}

// status is what updated says, asked in a way that proves the API.
func (n *node) status(ctx context.Context, creds client.Credentials) (*updatev1.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), creds)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{}); err != nil {
		return nil, err
	}
	return updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
}

// slot returns the version's slot; nil if it is in none.
func slot(s *updatev1.Status, version string) *updatev1.Slot {
	for _, v := range s.GetSlots() {
		if v.GetVersion() == version {
			return v
		}
	}
	return nil
}

// answers waits until the node tells of its slots.
func (l *life) answers(t *testing.T) *updatev1.Status {
	t.Helper()
	var st *updatev1.Status
	creds := l.n.credentials(t)
	eventually(t, 5*time.Minute, "the node answers", func() (err error) {
		if st, err = l.n.status(t.Context(), creds); err == nil && len(st.GetSlots()) != 2 {
			err = fmt.Errorf("status: %v", st)
		}
		return err
	})
	return st
}

// cut cuts the power after a while, at most limit, and powers the machine on again.
func (l *life) cut(t *testing.T, limit time.Duration) {
	t.Helper()
	after := time.Duration(l.rnd.Int64N(int64(limit)))
	wait(t.Context(), after)
	if err := l.m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.cuts++
	t.Logf("cut after %s of %s", after.Round(time.Millisecond), limit.Round(time.Millisecond))
}

func (l *life) on(t *testing.T) {
	t.Helper()
	if err := l.m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

// upgrade brings the node to a version, with early cuts while it is installed, and others from its first start on.
func (l *life) upgrade(t *testing.T, image, version string, early, cuts int) {
	t.Helper()
	for ; early > 0; early-- {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = l.n.try(ctx, 10*time.Minute, "bhctl", "upgrade", "--image", image, "--no-reboot") // it is cut off
		}()
		l.cut(t, l.install)
		cancel()
		<-done
		l.on(t)
	}
	st := l.answers(t)
	if v := slot(st, version); v.GetStatus() != "on trial" && !v.GetRunning() {
		start := time.Now()
		if out, err := l.n.try(t.Context(), 10*time.Minute, "bhctl", "upgrade", "--image", image, "--no-reboot"); err != nil {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		if l.install == 0 {
			l.install = time.Since(start)
		}
		st = l.answers(t)
	}
	start := time.Now()
	if !slot(st, version).GetRunning() {
		l.n.off(t, l.m)
		start = time.Now()
		l.on(t)
	}
	for ; cuts > 0; cuts-- {
		l.cut(t, l.trial+l.trial/4)
		l.on(t)
	}
	creds := l.n.credentials(t)
	eventually(t, 8*time.Minute, version+" is found good", func() error {
		st, err := l.n.status(t.Context(), creds)
		if v := slot(st, version); err == nil && (v.GetStatus() != "good" || !v.GetRunning()) {
			err = fmt.Errorf("%v", st.GetSlots())
		}
		return err
	})
	if l.trial == 0 {
		l.trial = time.Since(start)
	}
	if st := l.answers(t); st.GetFailure() != nil {
		t.Fatalf("a version was left: %v", st.GetFailure())
	}
	l.n.runs(t, version, l.generations)
}
