package machined

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// doc is a Machine document.
func doc(hostname string) string {
	return "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: " + hostname + "\n"
}

// mountOnSet makes storaged make STATE when it gets its first section.
func (n *node) mountOnSet(after time.Duration) {
	n.links[storaged].onSet = func(s *controlv1.Spec) *controlv1.State {
		time.AfterFunc(after, n.host.mount)
		return &controlv1.State{Generation: s.GetGeneration(), Converged: true}
	}
}

func TestFirstApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.mountOnSet(30 * time.Second)
		n.links["networkd"].steps = []string{"link eth0 up"}
		d, stop := n.start()
		defer stop()
		time.Sleep(time.Minute)
		for name, l := range n.links {
			if got := l.generations(); got != nil {
				t.Errorf("%s got generations %v before there was a configuration", name, got)
			}
		}
		if _, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{}); !errs.Is(err, errs.NotFound) {
			t.Errorf("get: %v", err)
		}
		resp, err := apply(d, doc("a"))
		if err != nil || resp.GetGeneration() != 1 || !resp.GetChanged() || len(resp.GetPlans()) != 1 || resp.GetPlans()[0].GetSteps()[0] != "link eth0 up" {
			t.Fatalf("got %v, %v", resp, err)
		}
		synctest.Wait()
		for name, l := range n.links {
			want := []uint64{1}
			if name == storaged {
				want = []uint64{1, 1}
			}
			if got := l.generations(); !reflect.DeepEqual(got, want) {
				t.Errorf("%s got generations %v, want %v", name, got, want)
			}
		}
		if got := string(n.links["networkd"].specs[0].GetDocuments()); !strings.Contains(got, "kind: Network") || !strings.Contains(got, "hostname: a") || strings.Contains(got, "kind: Storage") {
			t.Errorf("networkd got\n%s", got)
		}
		got, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{})
		if err != nil || got.GetDocuments() != doc("a") || got.GetGeneration() != 1 || !strings.Contains(got.GetEffective(), "stateSize: 256MiB") {
			t.Errorf("get: %v, %v", got, err)
		}
	})
}

func TestApplyAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		for i, c := range []struct {
			documents  string
			generation uint64
			changed    bool
		}{
			{doc("a"), 1, true}, {doc("a"), 1, false}, {"# only a remark\n" + doc("a"), 1, false}, {doc("b"), 2, true}, {doc("a"), 3, true},
		} {
			resp, err := apply(d, c.documents)
			if err != nil || resp.GetGeneration() != c.generation || resp.GetChanged() != c.changed {
				t.Errorf("apply %d: got %v, %v", i, resp, err)
			}
			synctest.Wait()
		}
		if got := n.links["apid"].generations(); !reflect.DeepEqual(got, []uint64{1, 2, 3}) {
			t.Errorf("apid got %v", got)
		}
		h, err := (&configServer{d: d}).ListHistory(t.Context(), &configv1.ListHistoryRequest{})
		if err != nil || len(h.GetGenerations()) != 3 || h.GetGenerations()[0].GetGeneration() != 3 || h.GetGenerations()[0].GetSha256() != h.GetGenerations()[2].GetSha256() {
			t.Errorf("history: %v, %v", h, err)
		}
		old, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{Generation: 2})
		if err != nil || old.GetDocuments() != doc("b") || !strings.Contains(old.GetEffective(), "hostname: b") {
			t.Errorf("get 2: %v, %v", old, err)
		}
		if _, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{Generation: 9}); !errs.Is(err, errs.NotFound) {
			t.Errorf("get 9: %v", err)
		}
		specs, err := (&configServer{d: d}).ListSpecs(t.Context(), &configv1.ListSpecsRequest{})
		if err != nil || len(specs.GetSpecs()) != len(recipients) || !specs.GetSpecs()[0].GetConverged() || specs.GetSpecs()[0].GetGeneration() != 3 {
			t.Errorf("specs: %v, %v", specs, err)
		}
	})
}

// TestApplyRefused: whatever is refused leaves everything as it was.
func TestApplyRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil     func(*node)
		documents string
		kind      errs.Kind
		want      string
	}{
		"invalid":          {func(*node) {}, "kind: Machine\n", errs.Invalid, "node.yaml:1: apiVersion: missing; the only version is bulkhead.dev/v1"},
		"daemon's refusal": {func(n *node) { n.links["networkd"].plan = errs.New(errs.Invalid, "no link eth9") }, doc("b"), errs.Invalid, "networkd: no link eth9"},
		"STATE full":       {func(n *node) { n.host.full = true }, doc("b"), errs.Exhausted, "STATE is full: store generation 2: write new.tmp: no space left on device; nothing was changed, generation 1 runs on"},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t)
			n.host.mounted = true
			d, stop := n.start()
			defer stop()
			if _, err := apply(d, doc("a")); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			c.spoil(n)
			if _, err := apply(d, c.documents); !errs.Is(err, c.kind) || errs.Text(err) != c.want {
				t.Errorf("%s: got %v, want %s", name, err, c.want)
			}
			synctest.Wait()
			got, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{})
			if err != nil || got.GetGeneration() != 1 || got.GetDocuments() != doc("a") || len(n.host.files) != 1 {
				t.Errorf("%s: now %v, %v, %d files", name, got, err, len(n.host.files))
			}
			if got := n.links["trustd"].generations(); !reflect.DeepEqual(got, []uint64{1}) {
				t.Errorf("%s: trustd got %v", name, got)
			}
		})
	}
}

func TestDryRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.links[storaged].plan = errs.New(errs.Precondition, "/dev/vda holds an NTFS file system; set Storage.wipe")
		n.links["kubeletd"].dead = true
		n.links["networkd"].steps = []string{"one", "two"}
		d, stop := n.start()
		defer stop()
		start := time.Now()
		resp, err := (&configServer{d: d}).Apply(t.Context(), &configv1.ApplyRequest{Documents: doc("a"), DryRun: true})
		if err != nil || !resp.GetChanged() || resp.GetGeneration() != 1 {
			t.Fatalf("got %v, %v", resp, err)
		}
		var got []string
		for _, p := range resp.GetPlans() {
			got = append(got, fmt.Sprint(p.GetDaemon(), p.GetSteps(), p.GetError()))
		}
		want := []string{"kubeletd[]did not answer within 5s", "networkd[one two]", "storaged[]/dev/vda holds an NTFS file system; set Storage.wipe"}
		if !reflect.DeepEqual(got, want) || time.Since(start) != planTime {
			t.Errorf("after %s got %q", time.Since(start), got)
		}
		if d.running.Set(running{}); len(n.host.files) != 0 || n.links["networkd"].generations() != nil {
			t.Error("a dry run changed something")
		}
	})
}

func TestForeignDataEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		l := n.links[storaged]
		l.plan = errs.New(errs.Precondition, "/dev/vda holds an NTFS file system; set Storage.wipe")
		d, stop := n.start()
		defer stop()
		start := time.Now()
		_, err := apply(d, doc("a"))
		if !errs.Is(err, errs.Precondition) || errs.Text(err) != "storaged: /dev/vda holds an NTFS file system; set Storage.wipe; nothing was changed" || time.Since(start) > time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		// The same, found out only while it works.
		l.setPlan(nil)
		l.onSet = func(s *controlv1.Spec) *controlv1.State {
			l.plan = errs.New(errs.Precondition, "the disk is too small")
			return &controlv1.State{Generation: s.GetGeneration(), Error: "the disk is too small"}
		}
		if _, err = apply(d, doc("a")); errs.Text(err) != "storaged: the disk is too small; nothing was changed" {
			t.Errorf("got %v", err)
		}
		// The person corrects the document: the same number, another section.
		l.setPlan(nil)
		n.mountOnSet(time.Second)
		if resp, err := apply(d, doc("b")); err != nil || resp.GetGeneration() != 1 {
			t.Errorf("got %v, %v", resp, err)
		}
	})
}

func TestStateNeverComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.links[storaged].onSet = func(s *controlv1.Spec) *controlv1.State {
			return &controlv1.State{Generation: s.GetGeneration(), Error: "mkfs.ext4: input/output error", Pending: []string{"format /dev/vda5"}}
		}
		d, stop := n.start()
		defer stop()
		time.AfterFunc(50*time.Second, n.links[storaged].restart) // it forgets, and gets its section again
		start := time.Now()
		_, err := apply(d, doc("a"))
		want := "STATE was not there after 2m0s; nothing was changed; storaged says: mkfs.ext4: input/output error"
		if !errs.Is(err, errs.Unavailable) || errs.Text(err) != want || time.Since(start) > 3*time.Minute {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
		if got := n.links[storaged].generations(); !reflect.DeepEqual(got, []uint64{1, 1}) {
			t.Errorf("storaged got %v", got)
		}
		if got := n.links["networkd"].generations(); got != nil {
			t.Errorf("networkd got %v", got)
		}
	})
}

// TestBoot: nothing is known until STATE is there; then everything is handed out, and again to whom starts later.
func TestBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.mountOnSet(time.Second)
		d, stop := n.start()
		if _, err := apply(d, doc("a")); err != nil {
			t.Fatal(err)
		}
		if _, err := apply(d, doc("b")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		stop()
		n.host.setMounted(false) // reboot
		for name := range n.links {
			n.links[name] = newModelLink()
		}
		time.AfterFunc(10*time.Second, n.host.mount)
		_, stop = n.start()
		defer stop()
		time.Sleep(9 * time.Second)
		if got := n.links["apid"].generations(); got != nil {
			t.Errorf("apid got %v before STATE was there", got)
		}
		time.Sleep(2 * time.Second)
		if got := n.links["apid"].generations(); !reflect.DeepEqual(got, []uint64{2}) {
			t.Errorf("apid got %v", got)
		}
		n.links["apid"].restart()
		time.Sleep(200 * time.Millisecond)
		if got := n.links["apid"].generations(); !reflect.DeepEqual(got, []uint64{2, 2}) {
			t.Errorf("apid got %v after its restart", got)
		}
	})
}

func TestDamagedGeneration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		for _, h := range []string{"a", "b"} {
			if _, err := apply(d, doc(h)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // else a daemon may see the second one only
		}
		stop()
		name := n.host.newest()
		n.host.files[name] = n.host.files[name][:50]
		d, stop = n.start()
		defer stop()
		synctest.Wait()
		got, err := (&configServer{d: d}).Get(t.Context(), &configv1.GetRequest{})
		if err != nil || got.GetGeneration() != 3 || got.GetDocuments() != doc("a") || !strings.Contains(got.GetCaller(), "generation 1") {
			t.Errorf("got %v, %v", got, err)
		}
		all := strings.Join(eventTexts(t, d), "\n")
		if !strings.Contains(all, "on STATE: generation 2: damaged") || !strings.Contains(all, "falls back to generation 1") {
			t.Errorf("events:\n%s", all)
		}
		if got := n.links["apid"].generations(); !reflect.DeepEqual(got, []uint64{1, 2, 3}) {
			t.Errorf("apid got %v", got)
		}
	})
}

// TestNewerDocument: a version that cannot read the newest generation works by the newest that it can, and keeps the other.
func TestNewerDocument(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		if _, err := apply(d, doc("a")); err != nil {
			t.Fatal(err)
		}
		d.mu.Lock()
		g, err := d.store.Load(1)
		if err == nil {
			g.Documents = []byte("apiVersion: bulkhead.dev/v2\nkind: Machine\n")
			_, err = d.store.Add(g)
		}
		d.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		stop()
		d, stop = n.start()
		defer stop()
		synctest.Wait()
		if now, _ := d.running.Get(); now.Number != 1 || len(n.host.files) != 2 {
			t.Errorf("generation %d runs, %d files", now.Number, len(n.host.files))
		}
	})
}

func TestRefusedSpecIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		l := n.links["trustd"]
		l.set = errs.New(errs.Conflict, "generation 1 is older than 2, which runs")
		d, stop := n.start()
		defer stop()
		if _, err := apply(d, doc("a")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		_, st := d.hand("trustd").report(1)
		if st.GetConverged() || !strings.Contains(st.GetError(), "older than 2") {
			t.Errorf("got %v", st)
		}
		l.mu.Lock()
		l.set = nil
		l.mu.Unlock()
		time.Sleep(5 * time.Second)
		if converged, st := d.hand("trustd").report(1); !converged {
			t.Errorf("got %v", st)
		}
	})
}

// A document without a name gets one, the same in every later generation and after a reboot; a name in the document goes first.
func TestNodeNamesItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		const plain = "apiVersion: bulkhead.dev/v1\nkind: Cluster\nname: "
		if _, err := apply(d, plain+"a\n"); err != nil {
			t.Fatal(err)
		}
		first, _ := d.running.Get()
		if !regexp.MustCompile(`^bulkhead-[0-9a-f]{6}$`).MatchString(first.set.Machine.Hostname) {
			t.Fatalf("name %q", first.set.Machine.Hostname)
		}
		if resp, err := apply(d, plain+"a\n"); err != nil || resp.GetChanged() {
			t.Errorf("the same document again: %v, %v; want unchanged", resp, err)
		}
		if _, err := apply(d, plain+"b\n"); err != nil {
			t.Fatal(err)
		}
		stop()
		d, stop = n.start() // a reboot: only STATE is left
		defer stop()
		synctest.Wait()
		if again, _ := d.running.Get(); again.Number != 2 || again.set.Machine.Hostname != first.set.Machine.Hostname {
			t.Errorf("generation %d has name %q, want 2 with %q", again.Number, again.set.Machine.Hostname, first.set.Machine.Hostname)
		}
		if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: mine\n"); err != nil {
			t.Fatal(err)
		}
		if now, _ := d.running.Get(); now.set.Machine.Hostname != "mine" {
			t.Errorf("name %q, want the document's", now.set.Machine.Hostname)
		}
	})
}

// TestApplyName: what a text is called stands before every error, and in lists that people see.
func TestApplyName(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	d, stop := n.start()
	defer stop()
	for _, name := range []string{" n.yaml", "n.yaml\n", "a\x1b[2Jb", "\t", "a\u202eb"} {
		_, err := (&configServer{d: d}).Apply(t.Context(), &configv1.ApplyRequest{Name: name})
		if !errs.Is(err, errs.Invalid) || !strings.HasPrefix(errs.Text(err), "name: found ") || strings.ContainsAny(errs.Text(err), "\n\t\x1b\u202e") {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := (&configServer{d: d}).Apply(t.Context(), &configv1.ApplyRequest{Name: "Äpfel und Birnen.yaml"}); err != nil {
		t.Error(err)
	}
}
