package etcdd

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"google.golang.org/grpc"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/vip"
)

// taken is a networkd that tells when virtual addresses come (1) or go (0).
type taken struct {
	networkv1.VirtualClient
	news chan int
}

func (v taken) Hold(_ context.Context, r *networkv1.HoldRequest, _ ...grpc.CallOption) (*networkv1.HoldResponse, error) {
	select {
	case v.news <- len(r.GetAddresses()):
	default: // it was told already
	}
	return &networkv1.HoldResponse{}, nil
}

// holder is what kubeletd of a control plane runs, over a connection of its own.
func holder(t *testing.T, n *node, name string) (news chan int, conn *grpc.ClientConn, stop func()) {
	t.Helper()
	conn = n.dial(t, uid.Kubeletd)
	news = make(chan int, 1)
	k, err := vip.New(vip.Config{
		Store: storev1.NewStoreClient(conn), Network: taken{news: news}, Healthy: func(context.Context) error { return nil },
		Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("kubeletd"),
		Times: vip.Times{Look: 50 * time.Millisecond, Call: 2 * time.Second, Hold: 1500 * time.Millisecond, Take: 3 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- k.Run(ctx, func() vip.Want {
			return vip.Want{Node: name, Addresses: []netip.Addr{netip.MustParseAddr("10.5.0.100")}}
		})
	}()
	stop = func() { cancel(); <-done; done <- nil }
	t.Cleanup(stop)
	return news, conn, stop
}

func await(ctx context.Context, t *testing.T, what string, news chan int) {
	t.Helper()
	select {
	case <-ctx.Done():
		t.Fatalf("%s never has the addresses", what)
	case got := <-news:
		if got != 1 {
			t.Fatalf("%s gives up %d addresses", what, got)
		}
	}
}

// virtual: over a real store one holder has the addresses; another waits out one that is cut off, and need not wait for one that says that it goes.
func virtual(ctx context.Context, t *testing.T, n *node) {
	first, conn, stopFirst := holder(t, n, "cp1")
	await(ctx, t, "the first", first)
	second, _, stopSecond := holder(t, n, "cp2")
	conn.Close() // as if its machine had lost its power
	cut := time.Now()
	stopFirst()
	await(ctx, t, "the second", second)
	if d := time.Since(cut); d < 2500*time.Millisecond || d > 10*time.Second {
		t.Errorf("the second has them %s after the first was cut off, want 3 s or little more", d)
	}
	third, _, _ := holder(t, n, "cp3")
	stopSecond()
	gone := time.Now()
	await(ctx, t, "the third", third)
	if d := time.Since(gone); d > 2500*time.Millisecond {
		t.Errorf("the third has them %s after they were given up, want at once", d)
	}
}
