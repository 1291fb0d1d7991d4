package apid

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// BenchmarkForward compares a call that a control plane passes on with the same call to the node itself. The issue wants its p50 within three times that of the direct one.
func BenchmarkForward(b *testing.B) {
	c := newCluster(b, "cp1", "w1")
	c.machines()
	ctx := b.Context()
	p50 := map[string]time.Duration{}
	for _, a := range []struct {
		name string
		conn *grpc.ClientConn
	}{{"direct", c.admin("w1")}, {"forwarded", c.admin("cp1")}} {
		b.Run(a.name, func(b *testing.B) {
			ctx := on(ctx, "w1")
			if err := getVersion(ctx, a.conn); err != nil {
				b.Fatal(err)
			}
			took := make([]time.Duration, 0, b.N)
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				if err := getVersion(ctx, a.conn); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			p50[a.name] = took[len(took)/2]
			b.ReportMetric(float64(p50[a.name].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			if p50["direct"] > 0 {
				b.ReportMetric(float64(p50[a.name])/float64(p50["direct"]), "×direct")
			}
		})
	}
}
