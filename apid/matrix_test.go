package apid

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
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
	local uid.ID   // over the Unix socket; 0: over TCP
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
	daemon := c.local != 0 && c.local != uid.Gateway
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
	case internal && c.local == uid.Gateway:
		return []codes.Code{codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented}
	case !internal && needs(authv1.Role_CLAIM):
		return []codes.Code{codes.FailedPrecondition} // somebody owns the node
	case !internal && needs(authv1.Role_JOIN) && c.local == 0:
		return []codes.Code{reached}
	case !internal && needs(authv1.Role_JOIN), c.roles == nil:
		return []codes.Code{codes.Unauthenticated}
	case internal:
		return []codes.Code{codes.Unimplemented}
	case needs(authv1.Role_KNOWN) && !has("node"):
		return []codes.Code{codes.OK}
	case needs(authv1.Role_UNLOCK) && has("admin") && c.local == uid.Gateway:
		return []codes.Code{codes.Unauthenticated} // there is no connection to tie it to
	case needs(authv1.Role_READER) && has("reader", "operator", "admin"), needs(authv1.Role_OPERATOR) && has("operator", "admin"), needs(authv1.Role_ADMIN) && has("admin"),
		needs(authv1.Role_UNLOCK) && has("admin"), needs(authv1.Role_ETCD_BACKUP) && has("etcd-backup"), needs(authv1.Role_NODE) && has("node"),
		!needs(authv1.Role_NODE) && !needs(authv1.Role_UNLOCK) && slices.ContainsFunc(c.roles, func(r string) bool { return customMay(r, service, method) }):
		return []codes.Code{reached}
	}
	return []codes.Code{codes.PermissionDenied}
}

// callers are all kinds of them.
func (c *cluster) callers(to string) []caller {
	n := c.nodes[to]
	ctx := c.t.Context()
	foreign, from, end := newAuthority(c.t), -time.Minute, time.Hour
	out := []caller{
		{"nobody", n.strangerConn(), ctx, nil, 0},
		{"garbage for a token", n.dial(client.Credentials{CA: []byte(text(c.f.ca.cert)), Token: "x.y.z"}), ctx, nil, 0},
		{"a foreign certificate", n.dial(c.f.certificate(foreign, "ann", "admin", from, end)), ctx, nil, 0},
		{"a foreign node", n.dial(c.f.holder(foreign, nodeSubject("w1", "worker"), from, end)), ctx, nil, 0},
		{"an expired certificate", n.dial(c.f.certificate(c.f.ca, "ann", "admin", -time.Hour, from)), ctx, nil, 0},
		{"a revoked token", n.dial(c.f.mint("revoked", "admin")), ctx, nil, 0},
		{"a node that is none", c.asNode(to, "w9", "worker"), ctx, nil, 0},
		{"a worker that says it is a control plane", c.asNode(to, "w1", controlPlane), ctx, nil, 0},
		{"an administrator called like a node", c.holding(to, pkix.Name{CommonName: "node:w1", Organization: []string{"bulkhead:admin"}}), ctx, nil, 0},
		{"a worker", c.asNode(to, "w1", "worker"), ctx, []string{"node"}, 0},
		{"a control plane", c.asNode(to, "cp2", controlPlane), ctx, []string{"node"}, 0},
		{"a worker for an administrator", c.asNode(to, "w1", "worker"), with(ctx, peer.HopKey, "1", peer.CallerKey, "ann", peer.RolesKey, "admin"), []string{"node"}, 0},
		{"gateway for nobody", n.as(uid.Gateway), ctx, nil, uid.Gateway},
	}
	for _, role := range []string{"reader", "operator", "admin", "etcd-backup", "dns-team", "elsewhere", "here", "no-role-at-all"} {
		token := c.f.mint("bob", role)
		out = append(out,
			caller{role + "'s certificate", n.dial(c.f.certificate(c.f.ca, "ann", role, from, end)), ctx, []string{role}, 0},
			caller{role + "'s token", n.dial(token), ctx, []string{role}, 0},
			caller{"a control plane for a " + role, c.asNode(to, "cp2", controlPlane), with(ctx, peer.HopKey, "1", peer.CallerKey, "ann", peer.RolesKey, role), []string{role}, 0},
			caller{"gateway for a " + role, n.as(uid.Gateway), with(ctx, "authorization", "Bearer "+token.Token), []string{role}, uid.Gateway})
	}
	for _, id := range []uid.ID{uid.Machined, uid.Etcdd, uid.Kubeletd, uid.Trustd, uid.Networkd, uid.Storaged, uid.Timed, uid.Updated, uid.KubeAPIServer} {
		out = append(out, caller{"daemon " + id.Name(), n.as(id, grpc.WithDisableRetry()), with(ctx, peer.NodeKey, peer.ControlPlanes), []string{"node"}, id})
	}
	return out
}

// Every method of every proto, called by everybody: the answer is what the method's annotation says, without exception.
func TestMatrix(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1")
	n := c.nodes["cp1"]
	c.tell(func(s *trustv1.TrustState) { s.Revoked = []string{"id-of-revoked"} })
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) > 0 })
	n.tellAccess(matrixRoles)
	answer := grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(reached, "reached") })
	for name := range n.daemon.conns {
		if name != trustd { // it has a fake already, which must answer
			n.anything(name, answer)
		}
	}
	calls := 0
	callers := c.callers("cp1")
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
	if calls < 3500 {
		t.Errorf("only %d calls: the walk does not work", calls)
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
