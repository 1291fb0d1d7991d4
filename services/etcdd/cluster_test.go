package etcdd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// A writer appends keys as long as its context lasts, and remembers what was acknowledged.
type writer struct {
	mu    sync.Mutex
	acked []string // guarded by mu
}

func (w *writer) run(ctx context.Context, c storev1.StoreClient) {
	for i := 0; ctx.Err() == nil; i++ {
		key := fmt.Sprintf("%sw/%05d", own, i)
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := c.Write(call, &storev1.WriteRequest{Changes: []*storev1.Change{{Key: key, Value: []byte("x")}}})
		cancel()
		if err == nil {
			w.mu.Lock()
			w.acked = append(w.acked, key)
			w.mu.Unlock()
		}
		_ = wait(ctx, 5*time.Millisecond)
	}
}

// check reads at a node what was acknowledged so far.
func (w *writer) check(ctx context.Context, t *testing.T, n *node) {
	t.Helper()
	w.mu.Lock()
	acked := append([]string(nil), w.acked...)
	w.mu.Unlock()
	r, err := n.store(t).Read(ctx, &storev1.ReadRequest{Prefix: own + "w/"})
	if err != nil {
		t.Fatalf("%s: %v", n.name, err)
	}
	have := map[string]bool{}
	for _, e := range r.GetEntries() {
		have[e.GetKey()] = true
	}
	lost := 0
	for _, k := range acked {
		if !have[k] {
			lost++
		}
	}
	if lost > 0 || len(acked) == 0 {
		t.Errorf("%s: %d of %d acknowledged writes are lost", n.name, lost, len(acked))
	}
}

// trio are three control planes that trust each other.
func trio(t *testing.T) []*node {
	ca, r := testca.New(t), &relay{}
	state := ca.State()
	var nodes []*node
	for i := 1; i <= 3; i++ {
		n := newNode(t, ca, fmt.Sprintf("n%d", i), fmt.Sprintf("127.0.0.%d", i))
		n.volume(t)
		n.others, n.turn = r, &turn{}
		if i > 1 {
			n.port = nodes[0].port // as on machines of their own
		}
		r.nodes = append(r.nodes, n)
		nodes = append(nodes, n)
		state.Nodes = append(state.Nodes, &trustv1.ClusterNode{Name: n.name, Role: "controlplane", Addresses: []string{n.addr}})
	}
	for _, n := range nodes[1:] {
		n.trust.Set(state)
	}
	// The first one was there before the others, and learns of them once it runs.
	nodes[0].start(t)
	nodes[0].until(t, converged)
	nodes[0].trust.Set(state)
	return nodes
}

func pendingHas(text string) func(*controlv1.State) bool {
	return func(s *controlv1.State) bool { return strings.Contains(s.GetError(), text) }
}

func TestCluster(t *testing.T) {
	t.Parallel()
	nodes := trio(t)
	n1, n2, n3 := nodes[0], nodes[1], nodes[2]
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	writing, stop := context.WithCancel(ctx)
	var w writer
	var g sync.WaitGroup
	g.Go(func() { w.run(writing, n1.store(t)) })
	defer g.Wait()
	defer stop()

	interrupted(ctx, t, n1, n2)
	n3.start(t)
	n3.until(t, converged)
	w.check(ctx, t, n2)
	w.check(ctx, t, n3)
	for _, n := range nodes {
		st := n.status(t)
		if st.GetState() != "running" || len(st.GetMembers()) != 3 {
			t.Errorf("%s: %v, want three members", n.name, st)
		}
		for _, m := range st.GetMembers() {
			if m.GetLearner() || m.GetName() == "" || len(m.GetPeerUrls()) != 1 {
				t.Errorf("%s: member %v, want a voter with a name and an address", n.name, m)
			}
		}
	}
	t.Run("leader forfeits", func(t *testing.T) { forfeits(ctx, t, nodes) })
	t.Run("second machine of one name", func(t *testing.T) { impostor(ctx, t, n1) })
	t.Run("one is down", func(t *testing.T) { oneDown(ctx, t, &w, n1, n2, n3) })
	t.Run("another address", func(t *testing.T) { moves(ctx, t, &w, n1, n3) })
	t.Run("copied disk", func(t *testing.T) { copied(t, n1, n3) })
	t.Run("data lost", func(t *testing.T) { dataLost(ctx, t, &w, n1, n2) })
	t.Run("leave", func(t *testing.T) { leaves(ctx, t, n1, n2, n3) })
	w.check(ctx, t, n1)
}

// interrupted joins n2, whose etcdd is restarted on the way: after it was admitted and before it knows, and while it has no vote.
func interrupted(ctx context.Context, t *testing.T, n1, n2 *node) {
	t.Helper()
	lost, err := etcdv1.NewPeersClient(n1.dial(t, uid.Apid)).AddMember(asNode(ctx, "n2", peer.RoleControlPlane), &etcdv1.AddMemberRequest{PeerUrls: []string{"https://127.0.0.2:" + n2.port}})
	if err != nil || len(lost.GetMembers()) != 2 {
		t.Fatalf("add n2: %v, %v, want two members", lost, err)
	}
	n2.others.noVotes.Store(true)
	n2.start(t)
	n2.until(t, pendingHas("no votes today"))
	if st := n2.status(t); st.GetState() != "joining" || st.GetMemberId() != lost.GetMemberId() {
		t.Errorf("n2: %v, want joining as %s", st, lost.GetMemberId())
	}
	if _, err := n2.store(t).Read(ctx, &storev1.ReadRequest{Prefix: own}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("read at a learner: %v, want Unavailable", err)
	}
	n2.stop(t)
	n2.start(t)
	n2.until(t, pendingHas("no votes today"))
	n2.others.noVotes.Store(false)
	n2.until(t, converged)
}

// moves: a node comes back with another address, and the others find it there.
func moves(ctx context.Context, t *testing.T, w *writer, n1, n3 *node) {
	n3.stop(t)
	n3.addr = "127.0.0.33"
	n3.start(t)
	want := "https://127.0.0.33:" + n3.port
	n3.until(t, converged)
	for _, m := range n1.status(t).GetMembers() {
		if m.GetName() == "n3" && (len(m.GetPeerUrls()) != 1 || m.GetPeerUrls()[0] != want) {
			t.Errorf("n3 is listed at %v, want %s", m.GetPeerUrls(), want)
		}
	}
	w.check(ctx, t, n3)
}

func forfeits(ctx context.Context, t *testing.T, nodes []*node) {
	for _, n := range nodes {
		if !n.status(t).GetLeader() {
			continue
		}
		r, err := n.etcd.ForfeitLeadership(ctx, &etcdv1.ForfeitLeadershipRequest{})
		if err != nil || r.GetLeader() == "" || r.GetLeader() == n.name {
			t.Fatalf("%s forfeits: %v, %v, want another one to lead", n.name, r, err)
		}
		if n.status(t).GetLeader() {
			t.Errorf("%s leads still", n.name)
		}
		again, err := n.etcd.ForfeitLeadership(ctx, &etcdv1.ForfeitLeadershipRequest{})
		if err != nil || again.GetLeader() != r.GetLeader() {
			t.Errorf("asked again: %v, %v, want %s to lead as before", again, err, r.GetLeader())
		}
		return
	}
	t.Error("nobody leads")
}

// impostor is a machine with n2's name and no data, and others that may not ask.
func impostor(ctx context.Context, t *testing.T, n1 *node) {
	c := etcdv1.NewPeersClient(n1.dial(t, uid.Apid))
	for _, x := range []struct {
		name, role, url string
		kind            errs.Kind
		text            string
	}{
		{"n2", peer.RoleControlPlane, "https://127.0.0.2:1", errs.Precondition, "bhctl etcd remove"},
		{"n2", peer.RoleControlPlane, "https://127.0.0.9:1", errs.Denied, "has not seen this node at 127.0.0.9"},
		{"n2", peer.RoleControlPlane, "http://127.0.0.2:1", errs.Invalid, "not like"},
		{"n2", peer.RoleWorker, "https://127.0.0.2:1", errs.Denied, "for control planes"},
		{"n9", peer.RoleControlPlane, "https://127.0.0.2:1", errs.Unavailable, "does not know it"},
	} {
		_, err := c.AddMember(asNode(ctx, x.name, x.role), &etcdv1.AddMemberRequest{PeerUrls: []string{x.url}})
		if !errs.Is(err, x.kind) || !strings.Contains(errs.Text(err), x.text) {
			t.Errorf("%s as %s at %s: %v, want %q", x.name, x.role, x.url, err, x.text)
		}
	}
	n1.tells(t, `\"node:n2\" may not change etcd's members`, "has not seen this node at 127.0.0.9")
	for _, m := range n1.status(t).GetMembers() {
		if m.GetName() != "n1" {
			continue
		}
		if _, err := c.Promote(asNode(ctx, "n2", peer.RoleControlPlane), &etcdv1.PromoteRequest{MemberId: m.GetId()}); !errs.Is(err, errs.Denied) {
			t.Errorf("n2 promotes n1's member: %v, want Denied", err)
		}
	}
	if _, err := c.AddMember(ctx, &etcdv1.AddMemberRequest{PeerUrls: []string{"https://127.0.0.2:1"}}); !errs.Is(err, errs.Denied) {
		t.Errorf("a person adds a member: %v, want Denied", err)
	}
}

// oneDown: with one of three away nothing may be taken away from the two; the dead one may be removed, and comes back when told to.
func oneDown(ctx context.Context, t *testing.T, w *writer, n1, n2, n3 *node) {
	n3.stop(t)
	w.check(ctx, t, n1)
	for what, err := range map[string]error{
		"remove n2": second(n1.etcd.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: "n2"})),
		"leave":     second(n2.etcd.Leave(ctx, &etcdv1.LeaveRequest{})),
		"defrag":    second(n1.etcd.Defragment(ctx, &etcdv1.DefragmentRequest{})),
	} {
		if !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "n3") {
			t.Errorf("%s: %v, want a refusal that names n3", what, err)
		}
	}
	n1.tells(t, "may not change etcd's members: remove n2", "n3")
	n2.tells(t, "may not change etcd's members: leave", "n3")
	if st := n2.status(t); st.GetState() != "running" {
		t.Errorf("after a refused leave: %v", st)
	}
	if _, err := n1.etcd.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: "n1"}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "etcd leave") {
		t.Errorf("a node removes itself: %v", err)
	}
	if _, err := n1.etcd.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: "n8"}); !errs.Is(err, errs.NotFound) || !strings.Contains(errs.Text(err), "n3 (") {
		t.Errorf("remove who is not there: %v, want the names there are", err)
	}
	if _, err := n1.etcd.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: "n3"}); err != nil {
		t.Fatal(err)
	}
	if _, err := n1.etcd.Defragment(ctx, &etcdv1.DefragmentRequest{}); err != nil {
		t.Errorf("defragment with all there: %v", err)
	}
	n3.start(t) // with its old data
	n3.until(t, pendingHas("bhctl etcd rejoin"))
	if st := n3.status(t); st.GetState() != "removed" {
		t.Errorf("n3: %v, want removed", st)
	}
	if _, err := n3.etcd.Rejoin(ctx, &etcdv1.RejoinRequest{}); err != nil {
		t.Fatal(err)
	}
	n3.until(t, converged)
	w.check(ctx, t, n3)
	if _, err := n3.etcd.Rejoin(ctx, &etcdv1.RejoinRequest{}); !errs.Is(err, errs.Precondition) {
		t.Errorf("rejoin of a member: %v, want Precondition", err)
	}
}

// copied: a second machine with n3's disk does not start n3's member, which runs.
func copied(t *testing.T, n1, n3 *node) {
	twin := newNode(n3.t, n3.ca, "n3", "127.0.0.44")
	twin.port = n3.port
	if err := os.CopyFS(filepath.Join(twin.dir, "data"), os.DirFS(n3.cfg.DataDir)); err != nil {
		t.Fatal(err)
	}
	state, _ := n1.trust.Get()
	twin.trust.Set(state)
	twin.start(t)
	twin.until(t, pendingHas("one of the two disks is a copy"))
	twin.stop(t)
}

// dataLost: a node whose disk was replaced does not vote again until somebody said that the old one is gone.
func dataLost(ctx context.Context, t *testing.T, w *writer, n1, n2 *node) {
	n2.stop(t)
	if err := os.RemoveAll(filepath.Join(n2.dir, "data")); err != nil {
		t.Fatal(err)
	}
	n2.volume(t)
	n2.start(t)
	n2.until(t, pendingHas("bhctl etcd remove"))
	if _, err := n1.etcd.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: "n2"}); err != nil {
		t.Fatal(err)
	}
	n2.until(t, converged)
	w.check(ctx, t, n2)
}

// leaves: to the last one, who may not.
func leaves(ctx context.Context, t *testing.T, n1, n2, n3 *node) {
	for _, n := range []*node{n3, n2} {
		if _, err := n.etcd.Leave(ctx, &etcdv1.LeaveRequest{}); err != nil {
			t.Fatalf("%s: %v", n.name, err)
		}
		if st := n.status(t); st.GetState() != "left" || len(st.GetMembers()) != 0 {
			t.Errorf("%s: %v, want left", n.name, st)
		}
		if data, err := hasData(n.cfg.DataDir); data || err != nil {
			t.Errorf("%s left and kept its data: %v", n.name, err)
		}
	}
	n3.stop(t)
	n3.start(t)
	n3.until(t, pendingHas("left the cluster by order"))
	if _, err := n1.etcd.Leave(ctx, &etcdv1.LeaveRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "last member") {
		t.Errorf("the last one leaves: %v", err)
	}
	if st := n1.status(t); st.GetState() != "running" || len(st.GetMembers()) != 1 {
		t.Errorf("n1: %v, want running, alone", st)
	}
}

func second[T any](_ T, err error) error { return err }
