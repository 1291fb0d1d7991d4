package apid

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// farEnv says to TestFarNodes how many nodes to be. They are another process, so that their memory is not counted as that of the node that calls them.
const farEnv = "APID_TEST_FAR_NODES"

// TestFarNodes is no test: farNodes runs it in another process. It reads the authority's PEM, writes a line with each node's address, and serves until its input ends.
func TestFarNodes(t *testing.T) {
	many, err := strconv.Atoi(os.Getenv(farEnv))
	if err != nil {
		return
	}
	in := bufio.NewReader(os.Stdin)
	f := &fakeTrustd{t: t, ca: readAuthority(t, in)}
	if _, f.token, err = ed25519.GenerateKey(nil); err != nil {
		t.Fatal(err)
	}
	f.own()
	state, _ := f.state.Get()
	state.Nodes = []*trustv1.ClusterNode{{Name: "cp1", Role: controlPlane, Key: "cp1"}}
	for i := range many {
		own := &fakeTrustd{t: t, ca: f.ca, token: f.token}
		own.state.Set(&trustv1.TrustState{Claimed: true, OsCa: state.GetOsCa(), TokenKeys: state.GetTokenKeys(), Nodes: state.GetNodes(), NodeName: farName(i), NodeRole: "worker"})
		n := bareNode(t, own, nil)
		n.serve(n.bind("trustd"), func(s *grpc.Server) { trustv1.RegisterSignerServer(s, own) })
		n.machined(&fakeMachined{version: func(context.Context) (*machinev1.GetVersionResponse, error) {
			return &machinev1.GetVersionResponse{Version: farName(i)}, nil
		}})
		n.start()
		fmt.Printf("far %s\n", n.address)
	}
	_, _ = io.Copy(io.Discard, in)
}

func farName(i int) string { return fmt.Sprintf("w%04d", i) }

func readAuthority(t *testing.T, in io.Reader) *authority {
	t.Helper()
	raw := make([]byte, 64<<10)
	n, err := in.Read(raw)
	if err != nil {
		t.Fatal(err)
	}
	cert, rest := pem.Decode(raw[:n])
	key, _ := pem.Decode(rest)
	if key == nil {
		t.Fatal("no PEM")
	}
	a := &authority{}
	if a.cert, err = x509.ParseCertificate(cert.Bytes); err == nil {
		a.key, err = x509.ParseECPrivateKey(key.Bytes)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// farNodes starts nodes in another process and makes them known to a cluster.
func (c *cluster) farNodes(many int) []string {
	c.t.Helper()
	exe, err := os.Executable()
	must := c.nodes["cp1"].must
	must(err)
	cmd := exec.Command(exe, "-test.run=^TestFarNodes$")
	cmd.Env = append(os.Environ(), farEnv+"="+strconv.Itoa(many))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	must(err)
	stdout, err := cmd.StdoutPipe()
	must(err)
	must(cmd.Start())
	out := bufio.NewScanner(stdout)
	c.t.Cleanup(func() {
		_ = stdin.Close() // it ends by that
		for out.Scan() {
		}
		must(cmd.Wait())
	})
	der, err := x509.MarshalECPrivateKey(c.f.ca.key)
	must(err)
	_, err = io.WriteString(stdin, text(c.f.ca.cert)+string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
	must(err)
	var names []string
	for len(names) < many && out.Scan() {
		if address, ok := strings.CutPrefix(out.Text(), "far "); ok {
			i := len(names)
			c.place(fmt.Sprintf("10.6.%d.%d", i/250, i%250), address)
			names = append(names, farName(i))
		}
	}
	if len(names) < many {
		c.t.Fatalf("%d of %d nodes: %v", len(names), many, out.Err())
	}
	c.tell(func(s *trustv1.TrustState) {
		for i, name := range names {
			s.Nodes = append(s.Nodes, &trustv1.ClusterNode{Name: name, Role: "worker", Addresses: []string{fmt.Sprintf("10.6.%d.%d", i/250, i%250)}, Key: name})
		}
	})
	c.nodes["cp1"].waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetNodes()) > many })
	return names
}

// fan is what one call of every node took.
type fan struct {
	all, p50, p99 time.Duration
}

func (c *cluster) fanOut(conn *grpc.ClientConn, names []string) fan {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var took []time.Duration
	begin := time.Now()
	for r := range client.Each(ctx, names, 0, func(ctx context.Context, node string) (time.Duration, error) {
		start := time.Now()
		got, err := version(ctx, conn)
		if err == nil && !strings.HasPrefix(got, node+":") {
			err = fmt.Errorf("%s answered", got)
		}
		return time.Since(start), err
	}) {
		if r.Err != nil {
			c.t.Errorf("%s: %v", r.Node, r.Err)
		}
		took = append(took, r.Value)
	}
	slices.Sort(took)
	return fan{time.Since(begin), took[len(took)/2], took[len(took)*99/100]}
}

// memory is what this process has in use, in bytes: heap and stacks.
func memory() float64 {
	runtime.GC()
	runtime.GC() // the first one only empties pools into their second generation
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

const (
	fanBudget    = 2 * time.Second // p99
	memoryBudget = 64 << 10        // bytes a node
)

// One control plane reaches many nodes: every one answers, in the budget's time, and an open connection costs what the budget says.
func TestFanOutToMany(t *testing.T) {
	c := newCluster(t, "cp1")
	names := c.farNodes(100)
	conn := c.admin("cp1")
	c.fanOut(conn, names[:1])
	before := memory()
	cold := c.fanOut(conn, names)
	each := (memory() - before) / float64(len(names))
	warm := c.fanOut(conn, names)
	t.Logf("%d nodes: cold %+v, warm %+v, %.1f KiB a node", len(names), cold, warm, each/1024)
	if cold.p99 > fanBudget || warm.p99 > fanBudget {
		t.Errorf("p99 of a call: first %s, then %s; allowed %s", cold.p99, warm.p99, fanBudget)
	}
	if each > 2*memoryBudget { // the benchmark has the budget itself: the race detector needs memory too, and one node has what is needed once
		t.Errorf("%.0f bytes a node, allowed %d", each, memoryBudget)
	}
}

// BenchmarkFanOut is one call of each of 1,000 nodes through one control plane.
func BenchmarkFanOut(b *testing.B) {
	c := newCluster(b, "cp1")
	names := c.farNodes(1000)
	conn := c.admin("cp1")
	c.fanOut(conn, names[:1])
	before := memory()
	cold := c.fanOut(conn, names)
	each := (memory() - before) / float64(len(names))
	var warm fan
	for b.Loop() {
		warm = c.fanOut(conn, names)
	}
	b.ReportMetric(cold.all.Seconds(), "first-s")
	b.ReportMetric(float64(cold.p99.Milliseconds()), "first-p99-ms")
	b.ReportMetric(warm.all.Seconds(), "then-s")
	b.ReportMetric(float64(warm.p99.Milliseconds()), "then-p99-ms")
	b.ReportMetric(each/1024, "KiB/node")
	if cold.p99 > fanBudget || warm.p99 > fanBudget || each > memoryBudget {
		b.Errorf("over the budget of %s and %d bytes a node", fanBudget, memoryBudget)
	}
}
