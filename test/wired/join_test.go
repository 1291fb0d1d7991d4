package wired

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/apid"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// store is etcdd's for trustd, without etcd.
type store struct {
	storev1.UnimplementedStoreServer
	mu       sync.Mutex
	data     map[string]*storev1.Entry // guarded by mu
	revision uint64                    // guarded by mu
	changed  latest.Cell[uint64]
}

func (s *store) Read(context.Context, *storev1.ReadRequest) (*storev1.ReadResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &storev1.ReadResponse{Entries: slices.Collect(maps.Values(s.data)), Revision: s.revision}, nil
}

func (s *store) Write(_ context.Context, r *storev1.WriteRequest) (*storev1.WriteResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range r.GetConditions() {
		if s.data[c.GetKey()].GetRevision() != c.GetRevision() {
			return nil, errs.New(errs.Conflict, "somebody else was first")
		}
	}
	s.revision++
	for _, c := range r.GetChanges() {
		if delete(s.data, c.GetKey()); !c.GetDelete() {
			s.data[c.GetKey()] = &storev1.Entry{Key: c.GetKey(), Value: c.GetValue(), Revision: s.revision}
		}
	}
	s.changed.Set(s.revision)
	return &storev1.WriteResponse{Revision: s.revision}, nil
}

func (s *store) Watch(r *storev1.WatchRequest, out grpc.ServerStreamingServer[storev1.WatchResponse]) error {
	return s.changed.Watch(out.Context(), func(uint64) error {
		all, err := s.Read(out.Context(), &storev1.ReadRequest{Prefix: r.GetPrefix()})
		if err != nil {
			return err
		}
		return out.Send(&storev1.WatchResponse{Entries: all.GetEntries(), Complete: true, Revision: all.GetRevision()})
	})
}

// doors are the nodes' apids by the addresses that the cluster sees them at, 10.5.0.N: loopback's 127.0.0.N, which means nothing to other nodes.
type doors map[string]*node

// seen is a listener whose callers come from where the cluster sees them.
type seen struct{ net.Listener }

type seenConn struct{ net.Conn }

func (l seen) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return seenConn{c}, err
}

func (c seenConn) RemoteAddr() net.Addr {
	a := *c.Conn.RemoteAddr().(*net.TCPAddr)
	if ip := a.IP.To4(); ip[3] != 1 {
		a.IP = net.IPv4(10, 5, 0, ip[3])
	}
	return &a
}

// startDoor starts apid with trustd as the one who calls on its Unix socket. It calls others from its node's address.
func (n *node) startDoor(all doors) {
	env := n.env("apid", n.inherit(n.local))
	if n.apidLog != nil {
		env.Log = n.apidLog
	}
	env.TCP, env.Who = seen{n.inherit(n.tcp)}, func(net.Conn) (uid.ID, error) { return uid.Trustd, nil }
	var from net.Dialer
	for ip, other := range all {
		if other == n {
			from.LocalAddr = &net.TCPAddr{IP: net.ParseIP(strings.Replace(ip, "10.5", "127.0", 1))}
		}
	}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		if host, port, err := net.SplitHostPort(address); err == nil && port == client.Port && all[host] != nil {
			address = all[host].address
		}
		return from.DialContext(ctx, network, address)
	}
	d, err := apid.New(apid.Config{Env: env, Dial: dial, Socket: func(name string) string { return filepath.Join(n.dir, name) }})
	n.must(err)
	n.run(d.Run)
}

func (n *node) serveStore(s storev1.StoreServer) {
	g := grpc.NewServer()
	storev1.RegisterStoreServer(g, s)
	l := n.bind("etcdd")
	go func() { _ = g.Serve(l) }()
	n.t.Cleanup(g.Stop)
}

// found makes n the first node of a cluster, under a name, and returns its owner's connection, which ends with the test, and credentials.
func (n *node) found(ctx context.Context, name string) (*grpc.ClientConn, client.Credentials) {
	n.t.Helper()
	creds, err := client.Claim(ctx, n.address, n.console.code(n.t), "ann")
	n.must(err)
	conn, err := client.Dial(n.address, creds)
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	n.specify(ctx, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: "+name+"\n")
	_, err = trustv1.NewTrustClient(conn).Bootstrap(ctx, &trustv1.BootstrapRequest{})
	n.must(err)
	return conn, creds
}

// specify is machined handing trustd its sections.
func (n *node) specify(ctx context.Context, documents string) {
	n.t.Helper()
	n.caller.Store(uint32(uid.Machined))
	defer n.caller.Store(uint32(uid.Apid))
	conn, err := peer.Dial(filepath.Join(n.dir, "trustd"))
	n.must(err)
	defer conn.Close()
	_, err = controlv1.NewControlClient(conn).SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 1, Documents: []byte(documents)}})
	n.must(err)
}

// join is what the operator's program does at a new machine.
func (n *node) join(ctx context.Context, name, token, endpoint string) (*trustv1.JoinClusterResponse, error) {
	n.t.Helper()
	code, err := claim.Normalize(n.console.code(n.t))
	n.must(err)
	raw, err := tls.Dial("tcp", n.address, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}) // the code shows who it is
	n.must(err)
	binding, err := claim.Binding(raw.ConnectionState())
	n.must(err)
	conn, err := grpc.NewClient("passthrough:node", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("bulkhead"), grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return raw, nil }))
	n.must(err)
	defer conn.Close()
	endpoints := []string{endpoint}
	sealed, err := claim.SealToken(code, binding, name, endpoints, token, rand.Reader)
	n.must(err)
	resp, err := trustv1.NewClaimClient(conn).JoinCluster(ctx, &trustv1.JoinClusterRequest{SealedToken: sealed, Endpoints: endpoints, Name: name, Proof: claim.JoinProof(code, binding, name, sealed, endpoints)})
	if err == nil && !claim.Equal(resp.GetProof(), claim.JoinedProof(code, binding, resp.GetCa(), resp.GetRole())) {
		n.t.Error("the node's proof that it joined is wrong")
	}
	return resp, err
}

// A second machine joins through real doors: afterwards the cluster's administrator is known there, and what is revoked in the cluster is not believed there.
func TestJoinThroughDoors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	shared := &store{data: map[string]*storev1.Entry{}}
	n1, n2, n3 := newNode(t), newNode(t), newNode(t)
	all := doors{"10.5.0.11": n1, "10.5.0.12": n2, "10.5.0.13": n3}
	for _, n := range []*node{n1, n2, n3} {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.serveStore(shared)
		n.startTrustd()
		n.startDoor(all)
	}
	conn, creds := n1.found(ctx, "n1")
	members := trustv1.NewMembershipClient(conn)
	made, err := members.MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "worker", Name: "n2"})
	n1.must(err)
	if _, err := n2.join(ctx, "n9", made.GetToken(), n1.address); status.Code(err) != codes.PermissionDenied || !strings.Contains(status.Convert(err).Message(), `called "n2", not "n9"`) {
		t.Errorf("under another name: %v", err)
	}
	resp, err := n2.join(ctx, "n2", made.GetToken(), n1.address)
	n2.must(err)
	if block, _ := pem.Decode(creds.CA); !bytes.Equal(resp.GetCa(), block.Bytes) || resp.GetRole() != "worker" {
		t.Errorf("joined as %q of another cluster", resp.GetRole())
	}
	if _, err := n3.join(ctx, "n3", made.GetToken(), n1.address); status.Code(err) != codes.Unauthenticated || !strings.Contains(status.Convert(err).Message(), `used by node "n2"`) {
		t.Errorf("the same token again: %v", err)
	}
	made, err = members.MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "controlplane"})
	n1.must(err)
	_, err = n3.join(ctx, "n3", made.GetToken(), n1.address)
	n3.must(err)

	// The first control plane reaches both for the administrator, and a worker passes nothing on.
	for name, role := range map[string]string{"n2": "node-worker", "n3": "node-controlplane"} {
		list, err := trustv1.NewTrustClient(conn).ListCertificates(client.OnNode(ctx, name), &trustv1.ListCertificatesRequest{})
		n1.must(err)
		if text := list.String(); !strings.Contains(text, "node:"+name) || !strings.Contains(text, role) {
			t.Errorf("the certificates of %s: %s", name, text)
		}
	}
	worker, err := client.Dial(n2.address, creds)
	n1.must(err)
	defer worker.Close()
	_, err = trustv1.NewTrustClient(worker).ListCertificates(client.OnNode(ctx, "n3"), &trustv1.ListCertificatesRequest{})
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), `"n2" is a worker and passes no calls on; ask a control plane: n1`) {
		t.Errorf("through a worker: %v", err)
	}

	// The cluster's administrator is known on both, and so is a token, until it is revoked.
	minted, err := trustv1.NewTrustClient(conn).MintToken(ctx, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}})
	n1.must(err)
	for _, n := range []*node{n2, n3} {
		at, err := client.Dial(n.address, creds)
		n.must(err)
		defer at.Close()
		_, err = trustv1.NewTrustClient(at).ListCertificates(ctx, &trustv1.ListCertificatesRequest{}, grpc.WaitForReady(true))
		n.must(err)
	}
	reads := func(n *node) error {
		at, err := client.Dial(n.address, client.Credentials{CA: creds.CA, Token: minted.GetToken()})
		n.must(err)
		defer at.Close()
		_, err = trustv1.NewTrustClient(at).ListCertificates(ctx, &trustv1.ListCertificatesRequest{})
		return err
	}
	for _, n := range []*node{n1, n2, n3} {
		n.must(reads(n))
	}
	_, err = members.Revoke(ctx, &trustv1.RevokeRequest{Id: minted.GetId()})
	n1.must(err)
	start := time.Now()
	for _, n := range []*node{n1, n2, n3} {
		for err := reads(n); ; err = reads(n) { // until it has heard
			if status.Code(err) == codes.Unauthenticated {
				break
			}
			n.must(err)
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the revocation took %s", d)
	}
	list, err := members.ListMembers(ctx, &trustv1.ListMembersRequest{})
	n1.must(err)
	var got []string
	for _, m := range list.GetMembers() {
		got = append(got, m.GetName()+" "+m.GetRole())
	}
	if strings.Join(got, ", ") != "n1 controlplane, n2 worker, n3 controlplane" {
		t.Errorf("members: %q", got)
	}
}
