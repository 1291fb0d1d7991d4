package apid

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"go/build"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	_ "github.com/bulkhead-os/bulkhead/api/keys/v1" // for daemons only: nobody gets there through apid
	_ "github.com/bulkhead-os/bulkhead/api/slot/v1"
	_ "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// reached is what every fake daemon answers: the call was let in.
const reached = codes.OutOfRange

// caller is somebody who calls every method.
type caller struct {
	name  string
	conn  *grpc.ClientConn
	ctx   context.Context
	roles []string // that count; nil: nobody
	unix  bool     // over the Unix socket
	local uid.ID   // with unix: who that is
}

// matrixRoles are roles of a document. docs/access.md says what they give.
const matrixRoles = `apiVersion: bulkhead.dev/v1
kind: Access
roles:
- name: dns-team
  allow: ["network.v1.*/*", machine.v1.Machine/Reboot, "trust.v1.*/*"]
- name: elsewhere
  allow: ["*/*"]
  nodes: {names: [cp2]}
- name: here
  allow: ["machine.v1.Machine/Get*"]
  nodes: {roles: [controlplane]}
`

// customMay is what matrixRoles give on cp1, written once more.
func customMay(role, service, method string) bool {
	switch role {
	case "dns-team":
		return service == "network.v1.Network" || service == "machine.v1.Machine" && method == "Reboot" || slices.Contains([]string{"trust.v1.Trust", "trust.v1.Membership", "trust.v1.Authorities"}, service)
	case "here":
		return service == "machine.v1.Machine" && strings.HasPrefix(method, "Get")
	}
	return false
}

// expected is the outcome that a method's annotation asks for, on an owned control plane. It is written after docs/apid.md, and uses nothing of what it judges.
func expected(service, method string, need []authv1.Role, served bool, c caller) []codes.Code {
	has := func(r ...string) bool {
		return slices.ContainsFunc(r, func(s string) bool { return slices.Contains(c.roles, s) })
	}
	needs := func(r authv1.Role) bool { return slices.Contains(need, r) }
	gateway := c.unix && c.local == uid.Gateway
	daemon := c.unix && !gateway
	internal := !served || len(need) == 0 || needs(authv1.Role_INTERNAL)
	switch {
	case daemon && !internal && needs(authv1.Role_NODE) && slices.Contains([]uid.ID{uid.Machined, uid.Etcdd, uid.Kubeletd}, c.local):
		return []codes.Code{reached}
	case daemon && (service == "control.v1.Control" && c.local == uid.Machined || service == "outbound.v1.Outbound" && c.local == uid.Trustd):
		return []codes.Code{codes.OK, codes.InvalidArgument} // apid's own: they answer
	case daemon:
		return []codes.Code{codes.PermissionDenied, codes.Unavailable} // refused by the list, or at the handshake
	case needs(authv1.Role_ANYBODY):
		return []codes.Code{codes.NotFound} // there is no issuer
	case internal && gateway:
		return []codes.Code{codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented}
	case !internal && needs(authv1.Role_CLAIM):
		return []codes.Code{codes.FailedPrecondition} // somebody owns the node
	case !internal && needs(authv1.Role_JOIN) && !c.unix:
		return []codes.Code{reached}
	case !internal && needs(authv1.Role_JOIN), c.roles == nil:
		return []codes.Code{codes.Unauthenticated}
	case internal:
		return []codes.Code{codes.Unimplemented}
	case needs(authv1.Role_KNOWN) && !has("node"):
		return []codes.Code{codes.OK}
	case needs(authv1.Role_UNLOCK) && has("admin") && gateway:
		return []codes.Code{codes.Unauthenticated} // there is no connection to tie it to
	case needs(authv1.Role_READER) && has("reader", "operator", "admin"), needs(authv1.Role_OPERATOR) && has("operator", "admin"), needs(authv1.Role_ADMIN) && has("admin"),
		needs(authv1.Role_UNLOCK) && has("admin"), needs(authv1.Role_ETCD_BACKUP) && has("etcd-backup"), needs(authv1.Role_NODE) && has("node"),
		!needs(authv1.Role_NODE) && !needs(authv1.Role_UNLOCK) && slices.ContainsFunc(c.roles, func(r string) bool { return customMay(r, service, method) }):
		return []codes.Code{reached}
	}
	return []codes.Code{codes.PermissionDenied}
}

// The ids of the credentials that were revoked before the calls.
var revoked = []string{"id-of-revoked"}

// callers are all kinds of them. Who is revoked is so already.
func (c *cluster) callers(to string) []caller {
	n := c.nodes[to]
	ctx := c.t.Context()
	foreign, from, end := newAuthority(c.t), -time.Minute, time.Hour
	stranger := &fakeTrustd{t: c.t, ca: c.f.ca}
	_, stranger.token, _ = ed25519.GenerateKey(rand.Reader)
	person, node := c.f.certificate(c.f.ca, "ann", "admin", from, end), c.f.holder(c.f.ca, nodeSubject("cp2", controlPlane), from, end)
	c.tell(func(s *trustv1.TrustState) { s.Revoked = append(s.Revoked, serial(c.t, person), serial(c.t, node)) })
	want := len(c.known(to).GetRevoked())
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) == want })
	tokens := map[string]client.Credentials{
		"garbage for a": {CA: []byte(text(c.f.ca.cert)), Token: "x.y.z"}, "a revoked": c.f.mint("revoked", "admin"), "another cluster's": stranger.mint("ann", "admin"),
		"an expired": c.f.mintUntil(time.Now().Add(-time.Minute), "ann", "admin"), "a node's name in a": c.f.mint("node:w1", "admin", "node", "node-worker"),
	}
	out := []caller{
		{name: "nobody", conn: n.strangerConn()},
		{name: "a foreign certificate", conn: n.dial(c.f.certificate(foreign, "ann", "admin", from, end))},
		{name: "a foreign node", conn: n.dial(c.f.holder(foreign, nodeSubject("w1", "worker"), from, end))},
		{name: "an expired certificate", conn: n.dial(c.f.certificate(c.f.ca, "ann", "admin", -time.Hour, from))},
		{name: "a certificate of tomorrow", conn: n.dial(c.f.certificate(c.f.ca, "ann", "admin", 23*time.Hour, 24*time.Hour))},
		{name: "a revoked certificate", conn: n.dial(person)},
		{name: "a revoked node", conn: n.dial(node)},
		{name: "an expired node", conn: n.dial(c.f.holder(c.f.ca, nodeSubject("cp2", controlPlane), -time.Hour, from))},
		{name: "a node that is none", conn: c.asNode(to, "w9", "worker")},
		{name: "a worker that says it is a control plane", conn: c.asNode(to, "w1", controlPlane)},
		{name: "an administrator called like a node", conn: c.holding(to, pkix.Name{CommonName: "node:w1", Organization: []string{"bulkhead:admin"}})},
		{name: "a worker", conn: c.asNode(to, "w1", "worker"), roles: []string{"node"}},
		{name: "a control plane", conn: c.asNode(to, "cp2", controlPlane), roles: []string{"node"}},
		{name: "a worker for an administrator", conn: c.asNode(to, "w1", "worker"), ctx: hop(ctx, "admin"), roles: []string{"node"}},
		{name: "a revoked control plane for an administrator", conn: n.dial(node), ctx: hop(ctx, "admin")},
		{name: "a foreign node for an administrator", conn: n.dial(c.f.holder(foreign, nodeSubject("cp2", controlPlane), from, end)), ctx: hop(ctx, "admin")},
		{name: "gateway for nobody", conn: n.as(uid.Gateway), unix: true, local: uid.Gateway},
		{name: "gateway that names an administrator", conn: n.as(uid.Gateway), ctx: hop(ctx, "admin"), unix: true, local: uid.Gateway},
	}
	for what, token := range tokens {
		out = append(out, caller{name: what + " token", conn: n.dial(token)},
			caller{name: "gateway with " + what + " token", conn: n.as(uid.Gateway), ctx: with(ctx, "authorization", "Bearer "+token.Token), unix: true, local: uid.Gateway})
	}
	for _, role := range []string{"reader", "operator", "admin", "etcd-backup", "dns-team", "elsewhere", "here", "no-role-at-all"} {
		token := c.f.mint("bob", role)
		roles := []string{role}
		out = append(out,
			caller{name: role + "'s certificate", conn: n.dial(c.f.certificate(c.f.ca, "ann", role, from, end)), roles: roles},
			caller{name: role + "'s token", conn: n.dial(token), roles: roles},
			caller{name: "a control plane for a " + role, conn: c.asNode(to, "cp2", controlPlane), ctx: hop(ctx, role), roles: roles},
			caller{name: "gateway for a " + role, conn: n.as(uid.Gateway), ctx: with(ctx, "authorization", "Bearer "+token.Token), roles: roles, unix: true, local: uid.Gateway})
	}
	for _, name := range uid.Names() { // whoever there is on a node
		if id, _ := uid.Lookup(name); id != uid.Gateway {
			out = append(out, caller{name: "daemon " + name, conn: n.as(id, grpc.WithDisableRetry()), ctx: with(ctx, peer.NodeKey, peer.ControlPlanes), roles: []string{"node"}, unix: true, local: id})
		}
	}
	for i := range out {
		if out[i].ctx == nil {
			out[i].ctx = ctx
		}
	}
	return out
}

// hop is what a control plane says of the caller whose call it passes on.
func hop(ctx context.Context, role string) context.Context {
	return with(ctx, peer.HopKey, "1", peer.CallerKey, "ann", peer.RolesKey, role)
}

// serial is a certificate's, as a revocation names it.
func serial(t testing.TB, c client.Credentials) string {
	t.Helper()
	block, _ := pem.Decode(c.Certificate)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert.SerialNumber.Text(16)
}

// judged is a cluster whose daemons answer every call with reached.
func judged(t *testing.T) *cluster {
	c := newCluster(t, "cp1", "cp2", "w1")
	c.tell(func(s *trustv1.TrustState) { s.Revoked = revoked })
	answer := grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(reached, "reached") })
	for _, n := range c.nodes {
		n.tellAccess(matrixRoles)
		for name := range n.daemon.conns {
			if name != trustd { // it has a fake already, which must answer
				n.anything(name, answer)
			}
		}
	}
	return c
}

// Every method of every proto, called by everybody: the answer is what the method's annotation says, without exception.
func TestMatrix(t *testing.T) {
	callers := judged(t).callers("cp1")
	calls := 0
	everyMethod(func(m protoreflect.MethodDescriptor, served bool) {
		service := string(m.Parent().FullName())
		name := "/" + service + "/" + string(m.Name())
		for _, who := range callers {
			want := expected(service, string(m.Name()), needOf(m), served, who)
			got := callOnce(who, m, name)
			calls++
			if !slices.Contains(want, got) {
				t.Errorf("%s by %s: %v, want %v", name, who.name, got, want)
			}
		}
	})
	if calls < 5000 {
		t.Errorf("only %d calls: the walk does not work", calls)
	}
}

// Every proto file there is takes part in the matrix, and every service that has a daemon to answer it is known to the program, not to this test alone.
func TestMatrixIsWhole(t *testing.T) {
	files, err := filepath.Glob("../api/*/v1/*.proto")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d proto files, %v", len(files), err)
	}
	program, err := build.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		path := strings.TrimPrefix(filepath.ToSlash(f), "../api/")
		d, err := protoregistry.GlobalFiles.FindFileByPath(path)
		if err != nil {
			t.Errorf("%s: no method of it is called: add its package to the imports of this test, or, if it is served to clients, to those of route.go", path)
			continue
		}
		for i := range d.Services().Len() {
			s := d.Services().Get(i)
			by, _ := proto.GetExtension(s.Options(), authv1.E_ServedBy).(string)
			if pkg := "github.com/bulkhead-os/bulkhead/api/" + filepath.Dir(path); by != "" && !slices.Contains(program.Imports, pkg) {
				t.Errorf("%s is served by %s, and apid has no route to it: add %s to the imports of route.go", s.FullName(), by, pkg)
			}
		}
	}
}

// anything starts a daemon that answers every call.
func (n *node) anything(name string, answer grpc.ServerOption) {
	own := n.inherit(n.bind(name))
	s := grpc.NewServer(answer)
	go func() { _ = s.Serve(own) }()
	n.t.Cleanup(s.Stop)
}

func everyMethod(f func(m protoreflect.MethodDescriptor, served bool)) {
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		if !strings.Contains(fmt.Sprint(file.Options()), "github.com/bulkhead-os/bulkhead") {
			return true
		}
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				f(s.Methods().Get(j), strings.Contains(fmt.Sprint(s.Options()), "served_by"))
			}
		}
		return true
	})
}

// callOnce makes one call with an empty message, and returns its outcome.
func callOnce(who caller, m protoreflect.MethodDescriptor, name string) codes.Code {
	ctx, cancel := context.WithTimeout(who.ctx, 10*time.Second)
	defer cancel()
	stream := &grpc.StreamDesc{ServerStreams: true, ClientStreams: m.IsStreamingClient()}
	s, err := who.conn.NewStream(ctx, stream, name, grpc.WaitForReady(false))
	if err == nil {
		_ = s.SendMsg(&emptypb.Empty{}) // the answer says why it failed
		_ = s.CloseSend()
		err = s.RecvMsg(&emptypb.Empty{})
	}
	if strings.HasPrefix(status.Convert(err).Message(), "unknown service") { // grpc's words in the fake trustd, which has not all of them: the call was let in
		return reached
	}
	return status.Code(err)
}

// needOf returns the roles in a method's proto: the tests go by the proto itself, the daemon by the table made from it.
func needOf(m protoreflect.MethodDescriptor) []authv1.Role {
	need, _ := proto.GetExtension(m.Options(), authv1.E_Need).([]authv1.Role)
	return need
}
