// Package peer says who is at the other end of a Unix socket, and lets only those in who are on a list.
//
// The kernel vouches for the user id (SO_PEERCRED, unix(7)). The process id is not used: ids are used again.
package peer

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"golang.org/x/sys/unix"
)

// UID reads the user id of the process that connected.
func UID(conn net.Conn) (uid.ID, error) {
	sc, ok := conn.(syscall.Conn) // *net.UnixConn, or one that embeds it
	if !ok {
		return 0, fmt.Errorf("peer: %T is no socket", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if sockErr != nil {
		return 0, fmt.Errorf("peer: SO_PEERCRED: %w", sockErr)
	}
	return uid.ID(cred.Uid), nil
}

// info is the grpc.AuthInfo of a connection.
type info struct {
	credentials.CommonAuthInfo
	id uid.ID
}

func (info) AuthType() string { return "peercred" }

// List says who may call what: the key is a service ("trust.v1.Signer") or a full method
// ("/trust.v1.Signer/SignCertificate"), which goes before its service. Unlisted means nobody.
type List map[string][]uid.ID

// Allows reports whether id may call the method "/service/Method".
func (l List) Allows(id uid.ID, method string) bool {
	ids, ok := l[method]
	if !ok {
		service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
		ids = l[service]
	}
	for _, a := range ids {
		if a == id {
			return true
		}
	}
	return false
}

// Knows reports whether id may call anything at all: others are refused at the handshake.
func (l List) Knows(id uid.ID) bool {
	for _, ids := range l {
		for _, a := range ids {
			if a == id {
				return true
			}
		}
	}
	return false
}

// creds are transport credentials that name the peer and refuse strangers at the handshake, before they cost anything.
type creds struct {
	list List
	who  func(net.Conn) (uid.ID, error)
}

func (c creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	id, err := c.who(conn)
	if err != nil {
		return nil, nil, err
	}
	if !c.list.Knows(id) {
		return nil, nil, fmt.Errorf("peer: user %d may call nothing here", id)
	}
	return conn, info{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, id}, nil
}

func (c creds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("peer: these credentials are for servers")
}
func (creds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (c creds) Clone() credentials.TransportCredentials { return c }
func (creds) OverrideServerName(string) error           { return nil }

// ServerOptions returns what a grpc.Server needs to enforce the list, for unary calls and streams alike.
// who may be nil: then UID is asked. Tests that run everything as one user pass their own.
func ServerOptions(list List, who func(net.Conn) (uid.ID, error)) []grpc.ServerOption {
	if who == nil {
		who = UID
	}
	check := func(ctx context.Context, method string) error {
		id, ok := From(ctx)
		if !ok || !list.Allows(id, method) {
			return errs.New(errs.Denied, "%s: user %q may not call it", method, id.Name())
		}
		return nil
	}
	return append([]grpc.ServerOption{
		grpc.Creds(creds{list, who}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, si *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := check(ctx, si.FullMethod); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, si *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := check(ss.Context(), si.FullMethod); err != nil {
				return err
			}
			return h(srv, ss)
		}),
	}, probed()...)
}

// From returns the user id of the calling process.
func From(ctx context.Context) (uid.ID, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return 0, false
	}
	i, ok := p.AuthInfo.(info)
	return i.id, ok
}

// Public adds to a list, for every service registered on s that has a served_by option, that apid alone may call it;
// methods whose need is INTERNAL are left out: they stay with those who are on the list already. Call it after all services are registered.
func Public(s *grpc.Server, list List) {
	for name := range s.GetServiceInfo() {
		list.public(methods.Of(name))
	}
}

// public is Public for one service.
func (l List) public(service []methods.Method) {
	if len(service) == 0 || service[0].ServedBy == "" {
		return
	}
	name := service[0].Service
	for _, m := range service {
		if _, listed := l[m.Full()]; !listed && slices.Contains(m.Need, authv1.Role_INTERNAL) {
			l[m.Full()] = slices.Clone(l[name])
		}
	}
	l[name] = append(l[name], uid.Apid)
}

// Caller is who stands behind a call that apid forwarded.
type Caller struct {
	Name  string   // for example "admin"; "" if the call did not come through apid
	Roles []string // "admin", "operator", "reader", "etcd-backup"
}

// Metadata keys under which apid passes the caller on. apid removes them from what clients send; only apid's word for them counts.
const (
	CallerKey = "bulkhead-caller"
	RolesKey  = "bulkhead-roles"
)

// CallerFrom returns the caller that apid named. From any other peer it is the zero value.
func CallerFrom(ctx context.Context) Caller {
	if id, ok := From(ctx); !ok || id != uid.Apid {
		return Caller{}
	}
	md, _ := metadata.FromIncomingContext(ctx)
	c := Caller{Roles: md.Get(RolesKey)}
	if v := md.Get(CallerKey); len(v) == 1 {
		c.Name = v[0]
	}
	return c
}
