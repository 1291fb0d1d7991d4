package etcdd

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// A world is a State that steps change: the model of etcd and of the node.
type world struct{ State }

// bools calls f with every combination of n truths.
func bools(n int, f func([]bool)) {
	for i := range 1 << n {
		b := make([]bool, n)
		for j := range b {
			b[j] = i>>j&1 == 1
		}
		f(b)
	}
}

func (w *world) do(s Step) {
	switch s.Op {
	case "write":
		w.Have[s.Name] = w.Want[s.Name]
	case "certify":
		w.Certified = []netip.Addr{netip.MustParseAddr(s.Name)}
	case "member found":
		w.Running, w.Data, w.Ready, w.Listed, w.ID, w.Loaded = true, true, true, []string{s.Arg}, "1", w.Have[caFile]
	case "member start":
		w.Running, w.Ready, w.Loaded = true, !w.Learner, w.Have[caFile]
	case "member join":
		w.Running, w.Data, w.Learner, w.Listed, w.ID, w.Loaded = true, true, true, []string{s.Arg}, "2", w.Have[caFile]
	case "member reload":
		w.Turn, w.Loaded = true, w.Have[caFile]
	case "member reloaded":
		w.Turn = false
	case "member promote":
		w.Learner, w.Ready = false, true
	case "member update":
		w.Listed = []string{s.Name}
	case "member leave": // ends in retire
		w.Running, w.Ready, w.Data, w.Phase, w.Listed = false, false, false, left, nil
	case "member forget":
		w.Data, w.Learner, w.Phase = false, false, left
	case "member stop":
		w.Running, w.Ready = false, false
	case "member restore":
		w.Data, w.Learner, w.Phase, w.Listed = true, false, inCluster, []string{s.Arg}
	default:
		if w.Auth.Users == nil {
			w.Auth = auth{Users: map[string][]string{}, Roles: map[string][]grant{}}
		}
		apply(&w.Auth, s)
	}
}

// crash is what a restart of etcdd leaves.
func (w *world) crash() {
	w.Running, w.Ready, w.Certified, w.Auth, w.Turn = false, false, nil, auth{}, false
}

// worlds are all small ones from which a node can begin.
func worlds(f func(name string, w *world)) {
	for _, p := range []phase{inCluster, leaving, abandoning, left, removed, restoring} {
		bools(5, func(b []bool) {
			data, others, addr, signed, learner := b[0], b[1], b[2], b[3], b[4]
			if learner && !data {
				return
			}
			w := &world{State: State{Bootstrapped: true, Volume: true, Phase: p, Data: data, Learner: learner, Port: "2380",
				Want: map[string]string{}, Have: map[string]string{}, Nodes: map[string]place{"n1": {ControlPlane: true}, "w1": {}}}}
			if data {
				w.Listed = []string{"https://127.0.0.1:2380"}
			}
			if others {
				w.Nodes["n2"] = place{ControlPlane: true}
			}
			if addr {
				w.Own = []netip.Prefix{netip.MustParsePrefix("10.5.0.11/24")}
			}
			if signed {
				w.Want = map[string]string{caFile: "a", serverFile: "b", peerFile: "c", rootClient: "d", ownClient: "e"}
			}
			f(fmt.Sprintf("phase %q, data %v, others %v, address %v, signed %v, learner %v", p, data, others, addr, signed, learner), w)
		})
	}
}

// Whatever a node begins with, and wherever it is interrupted, it ends in the same place, and never does what would cost data on the way.
func TestJoinFromAnywhere(t *testing.T) {
	worlds(func(name string, w *world) {
		end := settle(t, name, w, -1)
		for at := range 20 {
			// The same again, with a restart after one step.
			again := *w
			if got := settle(t, fmt.Sprintf("%s, restarted after step %d", name, at), &again, at); got != end {
				t.Errorf("%s, restarted after step %d: ends with %q, without a restart with %q", name, at, got, end)
			}
		}
	})
}

// settle applies plans until nothing is left but waiting, with a restart after step number at, and returns what is waited for and what there is.
func settle(t *testing.T, name string, from *world, at int) string {
	t.Helper()
	w := *from
	w.Want, w.Have, w.Nodes = maps.Clone(w.Want), maps.Clone(w.Have), maps.Clone(w.Nodes)
	n := 0
	for range 40 {
		before := w.State
		steps, err := plan(cp, w.State)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		safe(t, name, before, steps)
		moved := false
		for _, s := range steps {
			if s.Op == "wait for" {
				continue
			}
			moved = true
			w.do(s)
			if n++; n-1 == at {
				w.crash()
				break
			}
		}
		if !moved {
			var waits []string
			for _, s := range steps {
				waits = append(waits, s.String())
			}
			return fmt.Sprintf("%s; running %v, learner %v, phase %q, at %v", strings.Join(waits, ", "), w.Running, w.Learner, w.Phase, w.Listed)
		}
	}
	t.Errorf("%s: does not settle", name)
	return ""
}

// safe are the laws of every plan.
func safe(t *testing.T, name string, have State, steps []Step) {
	t.Helper()
	members := 0
	for _, s := range steps {
		if strings.HasPrefix(s.Op, "member ") {
			members++
		}
		bad := ""
		switch s.Op {
		case "member found":
			if have.Nodes["n2"].ControlPlane || have.Data || have.Phase != inCluster {
				bad = "a second cluster"
			}
		case "member join":
			if have.Data || have.Phase != inCluster {
				bad = "joined over data, or against an order"
			}
		case "member start":
			if !have.Data || have.Phase != inCluster && have.Phase != leaving {
				bad = "started what is no member"
			}
		case "member leave":
			if have.Phase != leaving {
				bad = "left without an order"
			}
		case "member forget":
			if have.Phase != leaving && have.Phase != abandoning || have.Running {
				bad = "data deleted without an order"
			}
		case "member stop", "member restore":
			if have.Phase != restoring && have.Phase != abandoning || have.Running != (s.Op == "member stop") {
				bad = "replaced without an order, or while it runs"
			}
		case "member update":
			if !have.Ready || have.Phase != inCluster {
				bad = "an address given by who is no member"
			}
		}
		starts := s.Op == "member found" || s.Op == "member join" || s.Op == "member start"
		if starts && (have.Want[peerFile] == "" || have.Want[ownClient] == "" || have.Running) {
			bad = "started without certificates, or twice"
		}
		if bad != "" {
			t.Errorf("%s: %s: %q", name, bad, s)
		}
	}
	if members > 1 {
		t.Errorf("%s: %d changes of the member in one round: %v", name, members, steps)
	}
}

func TestAdmit(t *testing.T) {
	voter := func(id uint64, name, url string) *etcdserverpb.Member {
		return &etcdserverpb.Member{ID: id, Name: name, PeerURLs: []string{url}}
	}
	learner := func(id uint64, name, url string) *etcdserverpb.Member {
		return &etcdserverpb.Member{ID: id, Name: name, PeerURLs: []string{url}, IsLearner: true}
	}
	n1 := voter(1, "n1", "https://10.5.0.11:2380")
	const url = "https://10.5.0.12:2380"
	for _, c := range []struct {
		name string
		list []*etcdserverpb.Member
		want admission
		err  string
	}{
		{"new", []*etcdserverpb.Member{n1}, admission{}, ""},
		{"asked again, the answer was lost", []*etcdserverpb.Member{n1, learner(2, "", url)}, admission{have: 2}, ""},
		{"asked again from another address of its own", []*etcdserverpb.Member{n1, learner(2, "", "https://10.5.0.22:2380")}, admission{drop: 2}, ""},
		{"a learner that lost its data", []*etcdserverpb.Member{n1, learner(2, "n2", url)}, admission{drop: 2}, ""},
		{"another one is joining", []*etcdserverpb.Member{n1, learner(3, "", "https://10.5.0.13:2380")}, admission{}, "one at a time"},
		{"a voter that lost its data", []*etcdserverpb.Member{n1, voter(2, "n2", url)}, admission{}, "bhctl etcd remove 2"},
		{"a voter of this name elsewhere", []*etcdserverpb.Member{n1, voter(2, "n2", "https://10.5.0.99:2380")}, admission{}, "another machine has this name"},
		{"another's address", []*etcdserverpb.Member{n1, voter(2, "n9", url)}, admission{}, `that of the member "n9"`},
		{"the first one is listed on loopback", []*etcdserverpb.Member{voter(1, "n1", "https://127.0.0.1:2380")}, admission{}, "no address yet"},
		{"the first one is listed where the caller is", []*etcdserverpb.Member{voter(1, "n1", "https://10.5.0.22:2380")}, admission{}, "give an address of that network as endpoint"},
	} {
		got, err := admit(c.list, "n2", []string{url}, nodeaddr.Parse([]string{"10.5.0.12", "10.5.0.22"}))
		if c.err == "" && (err != nil || got != c.want) || c.err != "" && (!errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), c.err)) {
			t.Errorf("%s: got %v, %v, want %v, %q", c.name, got, err, c.want, c.err)
		}
	}
}

// For all clusters of up to five members: what mayGo lets go leaves a quorum of those who answer.
func TestMayGo(t *testing.T) {
	for n := 1; n <= 5; n++ {
		bools(n, func(answers []bool) {
			var all []voice
			for i, a := range answers {
				all = append(all, voice{id: uint64(i + 1), name: fmt.Sprintf("n%d", i+1), answers: a})
			}
			for i := range all {
				stay := slices.Delete(slices.Clone(answers), i, i+1)
				alive := 0
				for _, a := range stay {
					if a {
						alive++
					}
				}
				want := alive > len(stay)/2
				if err := mayGo(all, all[i].id); (err == nil) != want {
					t.Errorf("members answer %v, number %d goes: %v, want allowed %v", answers, i+1, err, want)
				}
			}
			all = append(all, voice{id: 9, learner: true})
			if err := mayGo(all, 9); err != nil {
				t.Errorf("members answer %v, a learner goes: %v", answers, err)
			}
		})
	}
}

func TestPhase(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []phase{inCluster, leaving, left, inCluster, removed, abandoning, left, restoring, inCluster, inCluster} {
		if err := writePhase(dir, p); err != nil {
			t.Fatal(err)
		}
		if got, err := readPhase(dir); err != nil || got != p {
			t.Errorf("read %q, %v, want %q", got, err, p)
		}
	}
	if err := writePhase(dir, "gone"); err != nil {
		t.Fatal(err)
	}
	if p, err := readPhase(dir); err == nil {
		t.Errorf("an unknown phase was read as %q; to join by mistake is worse than to wait", p)
	}
}

// TestPhasesAtOnce: orders and the loop change the phase at once; none fails, and an order to abandon is not taken back by who had another one in mind.
func TestPhasesAtOnce(t *testing.T) {
	m := &member{cfg: Config{DataDir: t.TempDir()}}
	var g sync.WaitGroup
	for range 8 {
		g.Go(func() {
			for range 20 {
				if _, err := m.changePhase(abandoning); err != nil {
					t.Errorf("abandon: %v", err)
				}
				if _, err := m.changePhase(left, leaving, abandoning, left); err != nil {
					t.Errorf("forget: %v", err)
				}
			}
		})
	}
	g.Wait()
	if _, err := m.changePhase(abandoning); err != nil {
		t.Fatal(err)
	}
	m.stay()
	if _, err := m.changePhase(leaving, inCluster, leaving); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "abandoning") {
		t.Errorf("leave while it is abandoned: %v", err)
	}
	if p, err := readPhase(m.cfg.DataDir); p != abandoning || err != nil {
		t.Errorf("the phase is %q, %v, want abandoning", p, err)
	}
}
