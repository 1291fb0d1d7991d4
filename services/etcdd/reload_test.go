package etcdd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// turn is a trustd whose authorities are replaced, and what one etcdd reported.
type turn struct {
	ca latest.Cell[*testca.CA] // that signs
	// said is the newest report.
	said latest.Cell[*trustv1.ReportTrustRequest]
}

func (s signer) SignCertificate(ctx context.Context, r *trustv1.SignCertificateRequest, o ...grpc.CallOption) (*trustv1.SignCertificateResponse, error) {
	if s.turn != nil {
		if ca, _ := s.turn.ca.Get(); ca != nil {
			return ca.SignCertificate(ctx, r, o...)
		}
	}
	return s.CA.SignCertificate(ctx, r, o...)
}

func (s signer) ReportTrust(_ context.Context, r *trustv1.ReportTrustRequest, _ ...grpc.CallOption) (*trustv1.ReportTrustResponse, error) {
	if s.turn != nil {
		s.turn.said.Set(r)
	}
	return &trustv1.ReportTrustResponse{}, nil
}

// acts waits until the node has reported that it acts by what was said, with certificates of one authority alone.
func (n *node) acts(t *testing.T, name, authority string) {
	t.Helper()
	sum := sha256.Sum256([]byte(authority))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		r, changed := n.turn.said.Get()
		if r.GetAuthorities() == name && !slices.ContainsFunc(r.GetHeld(), func(h *trustv1.HeldCertificate) bool { return h.GetAuthority() != hex.EncodeToString(sum[:]) }) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s never acted by %q; at last %v", n.name, name, r)
		case <-changed:
		}
	}
}

// The authority of a cluster of three is replaced while somebody writes: no acknowledged write is lost, and members start anew one after the other.
func TestAuthorityIsReplaced(t *testing.T) {
	t.Parallel()
	nodes := trio(t)
	for _, n := range nodes[1:] {
		n.start(t)
	}
	for _, n := range nodes {
		n.until(t, converged)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	writing, stop := context.WithCancel(ctx)
	var w writer
	var g sync.WaitGroup
	g.Go(func() { w.run(writing, nodes[0].store(t)) })
	defer g.Wait()
	defer stop()

	begin := time.Now()
	next := testca.New(t)
	old, fresh := nodes[0].ca.State().GetEtcdCa(), next.State().GetEtcdCa()
	for i, s := range []struct{ bundle, signs string }{{old + fresh, old}, {fresh + old, fresh}, {fresh, fresh}} {
		name := fmt.Sprint("stage ", i)
		for _, n := range nodes {
			if s.signs == fresh {
				n.turn.ca.Set(next)
			}
			state, _ := n.trust.Get()
			state = proto.CloneOf(state)
			state.EtcdCa, state.Authorities = s.bundle, name
			n.trust.Set(state)
		}
		for _, n := range nodes {
			n.acts(t, name, s.signs)
			t.Logf("%s acts by %s after %s", n.name, name, time.Since(begin))
			n.until(t, converged)
		}
		for _, n := range nodes {
			w.check(ctx, t, n)
		}
	}
	// Who still shows a certificate of the old authority is none of them.
	if c := nodes[0].as(t, "etcd-root"); c != nil {
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if _, err := c.Get(short, "/x"); err == nil {
			t.Error("a client with a certificate of the old authority is served")
		}
	}
}
