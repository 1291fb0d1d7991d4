package apid

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// BenchmarkCall compares a call through apid with the same call to a daemon that speaks mutual TLS itself, and with one over a Unix socket.
// DESIGN 12 wants the p50 through apid within three times that of the direct one.
func BenchmarkCall(b *testing.B) {
	n := newNode(b, true)
	kill := n.machined(&fakeMachined{})
	defer kill()
	creds := n.trustd.certificate(n.trustd.ca, "ann", "admin", -time.Minute, time.Hour)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	n.must(err)
	pair, err := n.daemon.leaf.Wait(b.Context())
	n.must(err)
	bare := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*pair.TLS}, ClientCAs: n.trustd.ca.pool(), ClientAuth: tls.RequireAndVerifyClientCert})))
	machinev1.RegisterMachineServer(bare, &fakeMachined{})
	done := make(chan struct{})
	go func() { defer close(done); _ = bare.Serve(l) }()
	defer func() { bare.Stop(); <-done }()
	direct, err := client.Dial(l.Addr().String(), creds)
	n.must(err)
	defer direct.Close()

	p50 := map[string]time.Duration{}
	for _, c := range []struct {
		name string
		conn *grpc.ClientConn
		call func(context.Context, *grpc.ClientConn, ...grpc.CallOption) error
	}{{"direct", direct, getVersion}, {"apid", n.dial(creds), getVersion}, {"apid-token", n.dial(n.trustd.mint("ann", "admin")), getVersion}, {"apid-audited", n.dial(creds), reboot}} {
		b.Run(c.name, func(b *testing.B) {
			ctx := context.Background()
			if err := c.call(ctx, c.conn); err != nil {
				b.Fatal(err)
			}
			took := make([]time.Duration, 0, b.N)
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				if err := c.call(ctx, c.conn); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			p50[c.name] = took[len(took)/2]
			b.ReportMetric(float64(p50[c.name].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			if p50["direct"] > 0 {
				b.ReportMetric(float64(p50[c.name])/float64(p50["direct"]), "×direct")
			}
		})
	}
}

// reboot is a call that is audited; the daemon behind does nothing.
func reboot(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
	_, err := machinev1.NewMachineClient(conn).Reboot(ctx, &machinev1.RebootRequest{}, opts...)
	return err
}
