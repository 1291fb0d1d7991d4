package etcdd

import (
	"context"
	"errors"
	"strconv"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// compactKey is where Kubernetes' API servers read how far the history was compacted (k8s.io/apiserver, storage/etcd3/compact.go).
const compactKey = "compact_rev_key"

// history is how long old revisions are kept; it is Kubernetes' own default.
const history = 5 * time.Minute

// compact drops history. API servers did that themselves until etcd 3.7 reserved it to root; they run with
// --etcd-compaction-interval=0 and only follow compactKey, as they do for compactions by another API server.
func (m *member) compact(ctx context.Context) error {
	t := time.NewTicker(history)
	defer t.Stop()
	var before int64 // revision one tick ago; 0: unknown
	said := ""
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		e, client := m.running()
		if e == nil || e.Server.Leader() != e.Server.MemberID() {
			before = 0 // with several members the leader does it
			continue
		}
		call, cancel := context.WithTimeout(ctx, callTime)
		now, err := compactTo(call, client, before)
		cancel()
		if before = now; err == nil {
			said = ""
		} else if text := errs.Text(err); text != said && ctx.Err() == nil {
			m.cfg.Env.Log.Warn("history not compacted", "err", text)
			said = text
		}
	}
}

// compactTo drops what is older than rev, unless that is 0, and returns the present revision; 0 if there is an error.
func compactTo(ctx context.Context, c *clientv3.Client, rev int64) (now int64, err error) {
	if rev == 0 {
		r, err := c.Get(ctx, compactKey)
		if err != nil {
			return 0, err
		}
		return r.Header.GetRevision(), nil
	}
	if _, err := c.Compact(ctx, rev); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return 0, err
	}
	r, err := c.Put(ctx, compactKey, strconv.FormatInt(rev, 10))
	if err != nil {
		return 0, err
	}
	return r.Header.GetRevision(), nil
}
