package gate

import (
	"net/netip"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// BenchmarkAdmit is what a stranger costs who comes when all places are taken by others who say nothing: it must be little, for it is what a flood costs.
func BenchmarkAdmit(b *testing.B) {
	g := New(nil, maxConns, maxAll, NewFigures(metrics.New("x"), "bulkhead_x"))
	now := time.Now()
	crowd(g, maxConns, "192.0.2.1", now.Add(-time.Hour), false)
	from := netip.MustParseAddr("192.0.2.3")
	for b.Loop() {
		now = now.Add(time.Second)
		if _, ok := g.admit(&Conn{gate: g, since: now}, from); !ok {
			b.Fatal("refused")
		}
	}
}
