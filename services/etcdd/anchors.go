package etcdd

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// What the cluster remembers of nodes' audit logs. Each node has one key, without a lease: a node that is off for long is the one whose log is to be checked.
const (
	anchorsPrefix = "/bulkhead/audit/"
	anchorPause   = 10 * time.Minute // between two of a node that goes on
	lastPause     = time.Minute      // between one and that of a node that goes down: nobody can push old ones out in a moment
	maxAnchors    = 96
)

// anchored is one end of a node's audit log, as etcd holds it.
type anchored struct {
	Chain    string    `json:"chain"`
	Sequence uint64    `json:"seq"`
	Hash     string    `json:"hash"`
	At       time.Time `json:"at"` // by the clock of the control plane that took the report
}

// remembered decides what a report's head becomes: another anchor, or a word on what is wrong with it. Anchors are never replaced, so a log that was rewritten differs from
// an older one even if its new end is anchored too. It is pure.
func remembered(all []anchored, h *clusterv1.AuditHead, now time.Time) (next []anchored, wrong string) {
	if h.GetSequence() == 0 {
		return nil, ""
	}
	fresh := anchored{h.GetChain(), h.GetSequence(), h.GetHash(), now}
	for _, a := range slices.Backward(all) {
		if a.Chain != fresh.Chain {
			continue
		}
		switch {
		case fresh.Sequence < a.Sequence:
			return nil, fmt.Sprintf("the audit log went back: it had record %d at %s, and now ends with %d; look at it with: bhctl audit --verify", a.Sequence, a.At.UTC().Format(time.RFC3339), fresh.Sequence)
		case fresh.Sequence == a.Sequence && fresh.Hash != a.Hash:
			return nil, fmt.Sprintf("the audit log was rewritten: its record %d is another one than at %s; look at it with: bhctl audit --verify", a.Sequence, a.At.UTC().Format(time.RFC3339))
		case fresh.Sequence == a.Sequence:
			return nil, ""
		}
		break
	}
	if n := len(all); n > 0 && now.Sub(all[n-1].At).Abs() < pauseOf(h) {
		return nil, ""
	}
	return thin(append(slices.Clone(all), fresh)), ""
}

func pauseOf(h *clusterv1.AuditHead) time.Duration {
	if h.GetLast() {
		return lastPause
	}
	return anchorPause
}

// thin leaves every second of the older half out when there are too many: far back fewer are enough, for each one vouches for all records before it.
func thin(all []anchored) []anchored {
	if len(all) <= maxAnchors {
		return all
	}
	var out []anchored
	for i, a := range all {
		if i >= len(all)/2 || i%2 == 0 {
			out = append(out, a)
		}
	}
	return out
}

// anchor remembers the end of a node's audit log, now and then. It returns what is wrong with it, "" if nothing is.
func (r *registry) anchor(ctx context.Context, c *clientv3.Client, n *clusterv1.Node) (wrong string, err error) {
	h := n.GetAudit()
	if h.GetSequence() == 0 {
		return "", nil
	}
	r.mu.Lock()
	last, ok := r.ends[n.GetName()]
	r.mu.Unlock()
	// Most reports need no look into etcd: not much has passed since the newest anchor, with which this head agrees.
	if ok && last.Chain == h.GetChain() && (last.Sequence == h.GetSequence() && last.Hash == h.GetHash() || last.Sequence < h.GetSequence() && r.now().Sub(last.At).Abs() < pauseOf(h)) {
		return "", nil
	}
	key := anchorsPrefix + n.GetName()
	for range putTries {
		all, revision, err := readAnchors(ctx, c, key)
		if errors.Is(err, errAnchors) { // the node is no worse for it
			return err.Error(), nil
		}
		if err != nil {
			return "", err
		}
		next, wrong := remembered(all, h, r.now())
		if next == nil {
			if len(all) > 0 && wrong == "" {
				r.remember(n.GetName(), all[len(all)-1])
			}
			return wrong, nil
		}
		value, err := json.Marshal(next)
		if err != nil {
			return "", err
		}
		done, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, string(value))).Commit()
		if err != nil {
			return "", storeError("audit anchor", err)
		}
		if done.Succeeded {
			r.remember(n.GetName(), next[len(next)-1])
			return "", nil
		}
	}
	return "", errs.New(errs.Conflict, "report: others report of node %q at the same time; do two machines have one name?", n.GetName())
}

func (r *registry) remember(name string, a anchored) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ends[name] = a
}

var errAnchors = errors.New("what the cluster remembers of the audit log cannot be read")

// readAnchors returns a node's anchors, oldest first, and the key's revision, 0 if there is none.
func readAnchors(ctx context.Context, c *clientv3.Client, key string) ([]anchored, int64, error) {
	resp, err := c.Get(ctx, key)
	if err != nil {
		return nil, 0, storeError("audit anchors", err)
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, nil
	}
	var all []anchored
	if err := json.Unmarshal(resp.Kvs[0].GetValue(), &all); err != nil {
		return nil, 0, fmt.Errorf("%w: %s: %w", errAnchors, key, err)
	}
	return all, resp.Kvs[0].GetModRevision(), nil
}

func checkAudit(h *clusterv1.AuditHead) error {
	if h == nil || h.GetSequence() == 0 {
		return nil
	}
	if b, err := hex.DecodeString(h.GetHash()); err != nil || len(b) != 32 {
		return errs.New(errs.Invalid, "report: audit hash %.80q; it must be 64 hexadecimal digits", h.GetHash())
	}
	if len(h.GetChain()) == 0 || len(h.GetChain()) > 64 {
		return errs.New(errs.Invalid, "report: audit chain has %d bytes; allowed are 1 to 64", len(h.GetChain()))
	}
	return nil
}

// ListAuditAnchors answers from etcd, and so for nodes that are gone too.
func (s *registryServer) ListAuditAnchors(ctx context.Context, r *clusterv1.ListAuditAnchorsRequest) (*clusterv1.ListAuditAnchorsResponse, error) {
	if r.GetName() == "" || len(r.GetName()) > 253 {
		return nil, errs.New(errs.Invalid, "name: %.64q is no name of a node; bhctl get nodes lists them", r.GetName())
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var all []anchored
	err := s.d.kernel.repeat(ctx, func(ctx context.Context, l lent) (err error) {
		all, _, err = readAnchors(ctx, l.client, anchorsPrefix+r.GetName())
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errs.New(errs.NotFound, "node %q has told nothing of its audit log yet; bhctl get nodes lists those that report", r.GetName())
	}
	out := &clusterv1.ListAuditAnchorsResponse{}
	for _, a := range all {
		out.Anchors = append(out.Anchors, &clusterv1.AuditAnchor{Head: &clusterv1.AuditHead{Chain: a.Chain, Sequence: a.Sequence, Hash: a.Hash}, At: timestamppb.New(a.At)})
	}
	return out, nil
}
