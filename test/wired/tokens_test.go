package wired

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/test/history"
	"github.com/bulkhead-os/bulkhead/test/tokens"
)

// moody is a store that is away now and then, before or after it has done what it was told. A flaw makes it lie: it "forgets" one write in twenty, or its reads are "stale" now and then.
type moody struct {
	*store
	flaw          string
	reads, writes atomic.Int64 // that it carried out, or pretended to
	calm          atomic.Bool
	old           atomic.Pointer[storev1.ReadResponse]
}

func (m *moody) away(p float64) error {
	if m.calm.Load() || rand.Float64() > p {
		return nil
	}
	return errs.New(errs.Unavailable, "no leader")
}

func (m *moody) Read(ctx context.Context, r *storev1.ReadRequest) (*storev1.ReadResponse, error) {
	if err := m.away(0.02); err != nil {
		return nil, err
	}
	got, err := m.store.Read(ctx, r)
	if m.calm.Load() || m.flaw != "stale" {
		return got, err
	}
	if n := m.reads.Add(1); n == 40 {
		m.old.Store(got)
	} else if old := m.old.Load(); old != nil && n > 80 && n%10 == 0 {
		return old, nil
	}
	return got, err
}

func (m *moody) Write(ctx context.Context, r *storev1.WriteRequest) (*storev1.WriteResponse, error) {
	if err := m.away(0.05); err != nil {
		return nil, err
	}
	if m.flaw == "forgets" && !m.calm.Load() && m.writes.Add(1)%20 == 0 {
		return &storev1.WriteResponse{Revision: 1 << 40}, nil
	}
	got, err := m.store.Write(ctx, r)
	if e := m.away(0.05); e != nil {
		return nil, e
	}
	return got, err
}

// TestTokens: what two control planes say of join tokens, through apid and trustd, is linearizable as long as their store is; and the clients of the fault run find a store that is not.
func TestTokens(t *testing.T) {
	for _, flaw := range []string{"", "forgets", "stale"} {
		t.Run("store "+flaw, func(t *testing.T) {
			shared := &moody{store: &store{data: map[string]*storev1.Entry{}}, flaw: flaw}
			shared.calm.Store(true)
			doors, nodes := controlPlanes(t, shared)
			shared.calm.Store(false)
			c := history.Clients{Nodes: nodes, Writers: 4, Readers: 2, Open: doors.Open, Pause: 4 * time.Millisecond, Patience: 5 * time.Second, Most: tokens.Most, Seed: 1}
			r := history.Begin()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			c.Run(ctx, r)
			shared.calm.Store(true)
			if err := c.Look(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			f := history.Sum(r.Ops(), r.Now())
			if f.Added < 30 || f.Unknown == 0 || f.Listed < 30 {
				t.Errorf("too little happened: %s", f)
			}
			switch err := history.Check(r.Ops(), time.Minute); {
			case (err == nil) != (flaw == ""):
				t.Errorf("a store with the flaw %q is judged: %v", flaw, err)
			case err != nil:
				t.Log(err)
			}
		})
	}
}

// controlPlanes are two nodes with trustd and apid, which share a store.
func controlPlanes(t *testing.T, shared storev1.StoreServer) (*tokens.Doors, []string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	n1, n2 := newNode(t), newNode(t)
	all := doors{"10.5.0.11": n1, "10.5.0.12": n2}
	for _, n := range []*node{n1, n2} {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.serveStore(shared)
		n.startTrustd()
		n.startDoor(all)
	}
	conn, creds := n1.found(ctx, "n1")
	made, err := trustv1.NewMembershipClient(conn).MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "controlplane"})
	n1.must(err)
	_, err = n2.join(ctx, "n2", made.GetToken(), n1.address)
	n2.must(err)
	return tokens.New(creds, map[string]string{"n1": n1.address, "n2": n2.address}), []string{"n1", "n2"}
}
