package apid

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// watched is a machined whose event streams say one thing and then nothing.
func watched() *fakeMachined {
	return &fakeMachined{events: func(s grpc.ServerStreamingServer[machinev1.Event]) error {
		if err := s.Send(&machinev1.Event{Text: "now"}); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}}
}

// watch opens streams, 100 on each connection, and returns when all have said something.
func watch(t testing.TB, ctx context.Context, many int, dial func() *grpc.ClientConn) {
	t.Helper()
	var conn *grpc.ClientConn
	for i := range many {
		if i%100 == 0 {
			conn = dial()
		}
		s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
}

// A daemon takes so many calls on one connection: those who watch keep nobody else waiting.
func TestManyWatch(t *testing.T) {
	n := newNode(t, true)
	n.serve(n.bind("machined"), func(s *grpc.Server) { n.register(s, watched()) }, grpc.MaxConcurrentStreams(256))
	ctx, cancel := context.WithCancel(n.ctx())
	defer cancel()
	dial := func() *grpc.ClientConn { return n.dial(n.trustd.mint("ann", "reader")) }
	watch(t, ctx, 600, dial)
	n.must(getVersion(n.ctx(), dial()))
	b := n.daemon.conns["machined"]
	conns := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return 1 + len(b.more)
	}
	if got := conns(); got != 3 {
		t.Errorf("%d connections, want 3", got)
	}
	cancel()
	end, conn := n.ctx(), dial()
	for conns() > 1 { // each call gives its place back when it has ended
		n.must(getVersion(end, conn))
	}
}

// watchEnv says to TestWatchers how many streams to open. They are another process, so that it is apid's memory that is counted.
const watchEnv = "APID_TEST_WATCHERS"

// TestWatchers is no test: BenchmarkIdleWatches runs it in another process, as machined and as the clients. It reads a line each with apid's address, machined's
// socket and a token, and then the authority; it writes a line when all streams are open, and ends when its input does.
func TestWatchers(t *testing.T) {
	many, err := strconv.Atoi(os.Getenv(watchEnv))
	if err != nil {
		return
	}
	in := bufio.NewReader(os.Stdin)
	var lines [3]string
	for i := range lines {
		text, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		lines[i] = strings.TrimSpace(text)
	}
	ca, err := in.ReadBytes('#')
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", lines[1])
	if err != nil {
		t.Fatal(err)
	}
	list := peer.List{}
	s := grpc.NewServer(append(peer.ServerOptions(list, func(net.Conn) (uid.ID, error) { return uid.Apid, nil }), grpc.MaxConcurrentStreams(256))...)
	machinev1.RegisterMachineServer(s, watched())
	peer.Public(s, list)
	go func() { _ = s.Serve(l) }()
	defer s.Stop()
	watch(t, t.Context(), many, func() *grpc.ClientConn {
		conn, err := client.Dial(lines[0], client.Credentials{CA: ca, Token: lines[2]})
		if err != nil {
			t.Fatal(err)
		}
		return conn
	})
	fmt.Println("open")
	_, _ = io.Copy(io.Discard, in)
}

// BenchmarkIdleWatches is what streams cost apid on which nothing happens. The issue allows 300 MiB for 10,000.
func BenchmarkIdleWatches(b *testing.B) {
	const many, budget = 10000, 300 << 20
	n := newNode(b, true)
	before := memory()
	exe, err := os.Executable()
	n.must(err)
	cmd := exec.Command(exe, "-test.run=^TestWatchers$")
	cmd.Env = append(os.Environ(), watchEnv+"="+strconv.Itoa(many))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	n.must(err)
	stdout, err := cmd.StdoutPipe()
	n.must(err)
	n.must(cmd.Start())
	_, err = fmt.Fprintf(stdin, "%s\n%s\n%s\n%s#", n.address, n.socket("machined"), n.trustd.mint("ann", "reader").Token, text(n.trustd.ca.cert))
	n.must(err)
	out := bufio.NewScanner(stdout)
	for out.Scan() && out.Text() != "open" {
	}
	used := memory() - before
	b.ReportMetric(used/(1<<20), "MiB")
	b.ReportMetric(used/many/1024, "KiB/stream")
	b.ReportMetric(0, "ns/op")
	if used > budget || out.Text() != "open" {
		b.Errorf("%.0f MiB for %d streams, allowed %d", used/(1<<20), many, budget>>20)
	}
	n.must(stdin.Close())
	for out.Scan() {
	}
	n.must(cmd.Wait())
}
