package apid

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"google.golang.org/grpc/status"
)

// A daemon that hangs takes what it is sent and says nothing. Its caller hears who it is, before its own time is up.
func TestUnanswered(t *testing.T) {
	n := newNode(t, true)
	n.bind("storaged") // as PID 1 does; nobody accepts
	n.machined(&fakeMachined{})
	conn := n.dial(n.trustd.mint("ann", "admin"))
	n.must(getVersion(n.ctx(), conn))
	for _, limit := range []time.Duration{300 * time.Millisecond, 2 * time.Second} {
		ctx, cancel := context.WithTimeout(n.ctx(), limit)
		_, err := storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
		late := ctx.Err()
		cancel()
		if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "storaged has not answered for") || late != nil {
			t.Errorf("within %s: %v, %v", limit, err, late)
		}
	}
	n.must(getVersion(n.ctx(), conn)) // others do not wait
}
