package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/test/twin"
	"github.com/bulkhead-os/bulkhead/test/twin/derive"
)

// twinDocuments differ from generation to generation: each is an order to the twins.
func twinDocuments(generation int) string {
	return fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: twin\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: test\nnames: [localhost, 127.0.0.1, generation-%d.example]\n", generation)
}

// TestVMTwin boots a node whose daemons are evil twins (test/twin), has them try everything, and compares the answers with what follows from their units. What they
// were let do is written to docs/confinement: a page that changed fails the test, and is committed after somebody has read the difference.
func TestVMTwin(t *testing.T) {
	n := newNode(t)
	w, err := derive.New(os.DirFS(n.root))
	if err != nil {
		t.Fatal(err)
	}
	image := os.Getenv("BULKHEAD_TWIN") // of "make twin", for work on this test
	if image == "" {
		image = n.build(t, otherImage{version: "9.0.0", bin: n.twins(t)})
	}
	file := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(file, []byte(twinDocuments(1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.try(t.Context(), 5*time.Minute, "bhctl", "up", "--no-bootstrap", "--name", n.name, "--image", image, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
		"--kubernetes-port", fmt.Sprint(n.kubePort), "-f", file); err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
	conn := n.connect(t)
	// The node is there before its last folders are made: what is tried then would be another thing each time.
	eventually(t, 2*time.Minute, "all is as configured", func() error {
		r, err := configv1.NewConfigClient(conn).ListSpecs(t.Context(), &configv1.ListSpecsRequest{})
		for _, s := range r.GetSpecs() {
			if !s.GetConverged() && s.GetDaemon() != "etcdd" { // which has no cluster to be a member of
				err = errors.Join(err, fmt.Errorf("%s: %v", s.GetDaemon(), s.GetPending()))
			}
		}
		return err
	})
	answers := map[string]map[string]string{}
	for _, d := range twin.Daemons() {
		answers[d] = map[string]string{}
	}
	for stage := 1; stage <= 2; stage++ {
		if _, err := n.apply(t.Context(), conn, twinDocuments(1+stage)); err != nil {
			t.Fatal(err)
		}
		for _, d := range twin.Daemons() {
			eventually(t, 4*time.Minute, fmt.Sprintf("%s has tried all of stage %d", d, stage), func() error { return n.heard(t, d, stage, answers[d]) })
		}
	}
	for _, d := range twin.Daemons() {
		t.Run(d, func(t *testing.T) {
			u, tried := w.Units[d], 0
			for _, p := range twin.Probes() {
				answer, ok := answers[d][p.ID()]
				switch {
				case twin.Stage(p.Group, d) > 2:
					continue
				case !ok:
					t.Errorf("%s: not tried", p.ID())
					continue
				}
				if diff := w.Want(u, p).Check(answer); diff != "" {
					t.Errorf("%s: %s", p.ID(), diff)
				}
				tried++
			}
			t.Logf("» %s: %d probes", d, tried)
		})
	}
	ended := map[string]map[string]string{}
	for stage := 3; stage <= twin.Stages; stage++ {
		n.twinsEnd(t, w, stage, ended)
	}
	if t.Failed() {
		return // nothing that is to be committed
	}
	for _, d := range twin.Daemons() {
		n.page(t, d, derive.Page(w.Units[d], answers[d], ended[d]))
	}
}

// twins returns a folder of our programs, built as evil twins.
func (n *node) twins(t *testing.T) string {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	units, overlay := filepath.Join(dir, "units.go"), filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(n.root, "init/units.go"): units}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, text, 0o600); err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(buildFlags)
	args[2] += ",twin"
	for _, args := range [][]string{
		{"run", "./internal/unit/gen", "-errno", fmt.Sprint(int(twin.Killed)), "-out", units},
		append(args, "-overlay", overlay, "-o", bin+"/", "./init", "./cmd/bulkheadd", "./cmd/etcdd", "./cmd/kubeletd"),
	} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir, cmd.Env = n.root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, out)
		}
	}
	return bin
}

// heard reads what a twin has written so far; it returns nil when a stage is done.
func (n *node) heard(t *testing.T, daemon string, stage int, answers map[string]string) error {
	out, err := n.try(t.Context(), 30*time.Second, "bhctl", "logs", daemon)
	if err != nil {
		return err
	}
	done := false
	for _, l := range twinLines(t, out) {
		for id, answer := range l.Answers {
			answers[id] = answer
		}
		done = done || l.Stage == stage && l.Done
	}
	if !done {
		return fmt.Errorf("%d answers so far", len(answers))
	}
	return nil
}

// twinLines are the lines of a unit's log that its twin wrote.
func twinLines(t *testing.T, log string) (out []twin.Line) {
	t.Helper()
	for line := range strings.Lines(log) {
		_, text, ok := strings.Cut(line, twin.Prefix+"{")
		if !ok {
			continue
		}
		var l twin.Line
		if err := json.Unmarshal([]byte("{"+text), &l); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		out = append(out, l)
	}
	return out
}

// twinsEnd orders a stage that ends the process of some twins, and wants each of them back, and no other to have ended. It notes how each ended, by the stage's probe.
func (n *node) twinsEnd(t *testing.T, w *derive.World, stage int, ended map[string]map[string]string) {
	t.Helper()
	ends := map[string]*twin.Probe{}
	for _, p := range twin.Probes() {
		for _, d := range twin.Daemons() {
			if twin.Stage(p.Group, d) == stage {
				ends[d] = &p
			}
		}
	}
	before := n.services(t)
	// machined itself may be one of them: the answer may be lost.
	if _, err := n.apply(t.Context(), n.connect(t), twinDocuments(1+stage)); err != nil {
		t.Logf("» stage %d: the apply's answer was lost: %v", stage, err)
	}
	var after map[string]*machinev1.Service
	eventually(t, 6*time.Minute, fmt.Sprintf("every daemon is back after stage %d", stage), func() error {
		if out, err := n.try(t.Context(), 20*time.Second, "bhctl", "services"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		after = n.services(t)
		for d := range ends {
			if s := after[d]; s.State != "up" || s.Restarts == before[d].Restarts {
				return fmt.Errorf("%s is %s, restarted %d times, last exit %q", d, s.State, s.Restarts-before[d].Restarts, s.LastExit)
			}
		}
		return nil
	})
	for _, d := range twin.Daemons() {
		again, p := after[d].Restarts-before[d].Restarts, ends[d]
		if p == nil {
			if again != 0 {
				t.Errorf("%s was restarted %d times in stage %d, with %q, and is no part of it", d, again, stage, after[d].LastExit)
			}
			continue
		}
		if again != 1 {
			t.Errorf("%s: %s: restarted %d times, want once", d, p.ID(), again)
		}
		how := after[d].LastExit
		limit := fmt.Sprintf("killed by SIGKILL: it ran into its memory limit of %d MiB", w.Units[d].MemoryMax>>20)
		if want := map[string]string{twin.Threads: "exit 2", twin.Memory: limit}[p.Group]; how != want {
			t.Errorf("%s: %s: it ended with %q, want %q", d, p.ID(), how, want)
		}
		if p.Group == twin.Threads {
			n.threads(t, w.Units[d])
		}
		if ended[d] == nil {
			ended[d] = map[string]string{}
		}
		ended[d][p.ID()] = how + ", and started again"
	}
}

// threads wants a twin to have started as many threads as its unit allows, its own from before included.
func (n *node) threads(t *testing.T, u unit.Unit) {
	t.Helper()
	out := n.run(t, "bhctl", "logs", u.Name)
	most := 0
	for _, l := range twinLines(t, out) {
		most = max(most, l.Count)
	}
	t.Logf("» %s: started %d threads more, its unit allows %d in all", u.Name, most, u.PidsMax)
	if most >= int(u.PidsMax) || most < int(u.PidsMax)/2 || !strings.Contains(out, "runtime: failed to create new OS thread") {
		t.Errorf("%s: %d threads were started, its unit allows %d in all; the runtime's word of it is in its log: %v", u.Name, most, u.PidsMax, strings.Contains(out, "runtime: failed to create new OS thread"))
	}
}

// page writes a daemon's page, and fails if that changes it.
func (n *node) page(t *testing.T, daemon, text string) {
	t.Helper()
	file := filepath.Join(n.root, "docs/confinement", daemon+".md")
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if string(old) == text {
		return
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Errorf("docs/confinement/%s.md was another: it is written anew; commit it, after you have read what changed", daemon)
}
