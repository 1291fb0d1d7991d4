package wired

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/etcdd"
)

// within is how soon a revocation has to count everywhere.
const within = 5 * time.Second

var ends atomic.Int64

// dialAs connects to a daemon's socket as another daemon.
func (n *node) dialAs(id uid.ID, daemon string) *grpc.ClientConn {
	n.t.Helper()
	c, err := grpc.NewClient("passthrough:///"+daemon, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.UnixAddr{Net: "unix", Name: filepath.Join(n.dir, fmt.Sprintf("%s-%d", id.Name(), ends.Add(1)))}}
			return d.DialContext(ctx, "unix", filepath.Join(n.dir, daemon))
		}))
	n.must(err)
	n.t.Cleanup(func() { c.Close() })
	return c
}

func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// startEtcdd runs a real etcd behind the node's socket, with certificates of the node's trustd, and waits until its member leads.
func (n *node) startEtcdd(ctx context.Context, documents string) {
	n.t.Helper()
	env := n.env("etcdd", n.inherit(n.bind("etcdd")))
	env.Who = func(c net.Conn) (uid.ID, error) { return named(c, uid.Trustd), nil }
	for _, dir := range []string{"etcd", "etcd-run"} {
		n.must(os.Mkdir(filepath.Join(n.dir, dir), 0o700))
	}
	d, err := etcdd.New(etcdd.Config{Env: env, Signer: trustv1.NewSignerClient(n.dialAs(uid.Etcdd, "trustd")), DataDir: filepath.Join(n.dir, "etcd"), RunDir: filepath.Join(n.dir, "etcd-run"),
		Client: free(n.t), Peer: free(n.t), HTTP: free(n.t), Addresses: func() ([]netip.Prefix, error) { return []netip.Prefix{netip.MustParsePrefix("10.5.0.11/24")}, nil }})
	n.must(err)
	n.run(d.Run)
	control := controlv1.NewControlClient(n.dialAs(uid.Machined, "etcdd"))
	_, err = control.SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 1, Documents: []byte(documents)}})
	n.must(err)
	states, err := control.WatchState(ctx, &controlv1.WatchStateRequest{})
	n.must(err)
	for {
		s, err := states.Recv()
		n.must(err)
		if s.GetConverged() {
			return
		}
	}
}

// Two control planes and a worker, with a real etcd: what is revoked at one of them counts at each of them within five seconds, for new calls, for streams that
// are open, and for calls that are passed on; others notice nothing.
func TestRevokedEverywhere(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	n1, n2, n3 := newNode(t), newNode(t), newNode(t)
	nodes := map[string]*node{"n1": n1, "n2": n2, "n3": n3}
	all := doors{"10.5.0.11": n1, "10.5.0.12": n2, "10.5.0.13": n3}
	n2.must(os.Symlink(filepath.Join(n1.dir, "etcdd"), filepath.Join(n2.dir, "etcdd"))) // members among each other: TestCluster of etcdd
	for _, n := range nodes {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.startTrustd()
		n.startDoor(all)
		g, l := grpc.NewServer(), n.bind("machined")
		machinev1.RegisterMachineServer(g, chatty{})
		go func() { _ = g.Serve(l) }()
		t.Cleanup(g.Stop)
	}
	owner, err := client.Claim(ctx, n1.address, n1.console.code(t), "ann")
	n1.must(err)
	dial := func(n *node, c client.Credentials) *grpc.ClientConn {
		conn, err := client.Dial(n.address, c)
		n.must(err)
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	admin := dial(n1, owner)
	const document = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n"
	n1.specify(ctx, document)
	_, err = trustv1.NewTrustClient(admin).Bootstrap(ctx, &trustv1.BootstrapRequest{})
	n1.must(err)
	n1.startEtcdd(ctx, document+"---\napiVersion: bulkhead.dev/v1\nkind: Cluster\netcd: {snapshots: {every: 0}}\n")
	for name, role := range map[string]string{"n2": "controlplane", "n3": "worker"} {
		made, err := trustv1.NewMembershipClient(admin).MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: role, Name: name})
		n1.must(err)
		_, err = nodes[name].join(ctx, name, made.GetToken(), n1.address)
		nodes[name].must(err)
	}

	bad := map[string]client.Credentials{}
	minted, err := trustv1.NewTrustClient(admin).MintToken(ctx, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}})
	n1.must(err)
	bad["token"] = client.Credentials{CA: owner.CA, Token: minted.GetToken()}
	certificate, serial := issue(ctx, t, admin, owner.CA)
	bad["certificate"] = certificate
	looks := func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := trustv1.NewTrustClient(conn).ListCertificates(ctx, &trustv1.ListCertificatesRequest{}, grpc.WaitForReady(true))
		return err
	}
	open := func(ctx context.Context, conn *grpc.ClientConn) grpc.ServerStreamingClient[machinev1.Event] {
		s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{}, grpc.WaitForReady(true))
		n1.must(err)
		_, err = s.Recv()
		n1.must(err)
		return s
	}
	streams := map[string]grpc.ServerStreamingClient[machinev1.Event]{}
	conns := map[string]*grpc.ClientConn{}
	for what, creds := range bad {
		for name, n := range nodes {
			conns[what+" at "+name] = dial(n, creds)
			n.must(looks(ctx, conns[what+" at "+name]))
			streams[what+" at "+name] = open(ctx, conns[what+" at "+name])
		}
		streams[what+" at n3, through n2"] = open(client.OnNode(ctx, "n3"), conns[what+" at n2"])
		n1.must(looks(client.OnNode(ctx, "n3"), conns[what+" at n2"]))
	}
	stays := open(ctx, dial(n3, owner))

	start := time.Now()
	for _, id := range []string{minted.GetId(), serial} {
		_, err = trustv1.NewMembershipClient(dial(n2, owner)).Revoke(ctx, &trustv1.RevokeRequest{Id: id})
		n2.must(err)
	}
	soon, cancel := context.WithDeadline(ctx, start.Add(within))
	defer cancel()
	var wait sync.WaitGroup
	for what, s := range streams {
		wait.Go(func() {
			var err error
			for err == nil {
				_, err = s.Recv()
			}
			if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "were revoked") {
				t.Errorf("the stream of the %s: %v", what, err)
			}
			if took := time.Since(start); took > within {
				t.Errorf("the stream of the %s ended after %s", what, took)
			}
			// Its node knows: nothing new is let in there.
			where := strings.Replace(what, "n3, through ", "", 1)
			if err := looks(soon, conns[where]); status.Code(err) != codes.Unauthenticated {
				t.Errorf("a new call with the %s: %v", what, err)
			}
		})
	}
	wait.Wait()
	for what := range bad {
		if err := looks(client.OnNode(soon, "n3"), conns[what+" at n2"]); status.Code(err) != codes.Unauthenticated {
			t.Errorf("passed on with the %s: %v", what, err)
		}
	}
	t.Logf("after %s", time.Since(start))
	n3.must(looks(ctx, dial(n3, owner)))
	for range 2 { // somebody else's goes on
		_, err = stays.Recv()
		n3.must(err)
	}
}

// chatty is a machined that says something again and again.
type chatty struct {
	machinev1.UnimplementedMachineServer
}

func (chatty) StreamEvents(_ *machinev1.StreamEventsRequest, s grpc.ServerStreamingServer[machinev1.Event]) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := s.Send(&machinev1.Event{Text: "x"}); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

// issue returns a reader's certificate and its serial.
func issue(ctx context.Context, t *testing.T, admin *grpc.ClientConn, ca []byte) (client.Credentials, string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(err)
	issued, err := trustv1.NewTrustClient(admin).IssueCertificate(ctx, &trustv1.IssueCertificateRequest{Csr: csr, Name: "bob", Roles: []string{"reader"}})
	must(err)
	cert, err := x509.ParseCertificate(issued.GetCertificate())
	must(err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	return client.Credentials{CA: ca, Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}, cert.SerialNumber.Text(16)
}
