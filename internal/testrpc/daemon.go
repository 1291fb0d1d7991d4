package testrpc

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// A Caller is who calls a daemon: a user of the node, and whom apid names as the one behind it. Others name somebody too, as apid does: their word counts for nothing.
type Caller struct {
	ID    uid.ID
	Name  string
	Roles []string
}

func (c Caller) String() string { return fmt.Sprintf("%s for %q", c.ID.Name(), c.Name) }

// Callers are all that are tried.
var Callers = []Caller{
	{ID: uid.Apid}, {ID: uid.Machined}, {ID: uid.Etcdd}, {ID: uid.Kubeletd}, {ID: uid.Trustd}, {ID: uid.Networkd}, {ID: uid.Storaged}, {ID: uid.Timed}, {ID: uid.Updated}, {ID: uid.Gateway},
	{ID: uid.KubeAPIServer}, {ID: uid.KubeControllerMgr}, {ID: uid.KubeScheduler}, {ID: uid.Root},
	{uid.Apid, "admin", []string{"admin"}}, {uid.Apid, "someone", []string{"reader"}}, {uid.Apid, "ops", []string{"operator", "etcd-backup"}},
	{uid.Apid, peer.NodePrefix + "w1", []string{peer.RoleNode, peer.RoleWorker}}, {uid.Apid, peer.NodePrefix + "cp1", []string{peer.RoleNode, peer.RoleControlPlane}},
	{uid.Machined, "admin", []string{"admin"}}, {uid.Kubeletd, peer.NodePrefix + "cp1", []string{peer.RoleNode, peer.RoleControlPlane}},
}

// A Socket is where a daemon under test listens. All callers are one user in a test: who connects is whom the target says.
type Socket struct {
	net.Listener
	Ready func() bool // nil, or what is to be true before the first call
	path  string
	name  string // of the daemon
	who   atomic.Uint32

	mu     sync.Mutex
	panics []string // guarded by mu; that the daemon's log tells
}

// Listen makes a socket in a folder of its own.
func Listen(f *testing.F) *Socket {
	f.Helper()
	path := filepath.Join(f.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		f.Fatal(err)
	}
	return &Socket{Listener: l, path: path}
}

// Who is for daemon.Env.
func (s *Socket) Who(net.Conn) (uid.ID, error) { return uid.ID(s.who.Load()), nil }

// Env is what PID 1 gives a daemon, with this socket.
func (s *Socket) Env(name string) daemon.Env {
	s.name = name
	return daemon.Env{Name: name, Log: slog.New(slog.NewTextHandler(s, nil)), Listen: s, Ready: func() {}, Metrics: metrics.New(name), Who: s.Who}
}

// Write takes a line of the daemon's log.
func (s *Socket) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "panicked") {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.panics = append(s.panics, string(line))
	}
	return len(line), nil
}

func (s *Socket) panicked() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.panics, "\n")
}

// Services are those that a daemon serves, ours only: by what their protos say, and by its list.
func Services(name string, extra peer.List) (all []string) {
	if name != uid.Machined.Name() { // which calls the others'
		all = append(all, controlv1.Control_ServiceDesc.ServiceName)
	}
	for _, m := range methods.All() {
		if m.ServedBy == name {
			all = append(all, m.Service)
		}
	}
	for key := range extra {
		service, _, _ := strings.Cut(strings.TrimPrefix(key, "/"), "/")
		if len(methods.Of(service)) > 0 {
			all = append(all, service)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Fuzz sends random messages to every method of the services, all of the daemon's if none is named, as every caller, to a daemon that run serves on the socket
// until its context is done.
// Besides what Judge wants: who may not call a method, by extra and by its proto, never gets another answer than that, and who may never gets that one.
func (s *Socket) Fuzz(f *testing.F, run func(context.Context) error, extra peer.List, services ...string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx); close(done) }()
	f.Cleanup(func() { cancel(); <-done })
	if s.Ready != nil {
		s.await(f, done)
	}
	if len(services) == 0 {
		services = Services(s.name, extra)
	}
	conns := map[uid.ID]*grpc.ClientConn{}
	for _, c := range Callers {
		if conns[c.ID] != nil {
			continue
		}
		s.who.Store(uint32(c.ID))
		conn, err := peer.Dial(s.path)
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { conn.Close() })
		conn.Connect()
		for state := conn.GetState(); state != connectivity.Ready && state != connectivity.TransientFailure; state = conn.GetState() {
			conn.WaitForStateChange(ctx, state)
		}
		if conn.GetState() != connectivity.Ready {
			conn.Close() // a stranger: it must not come back as somebody else
		}
		conns[c.ID] = conn
	}
	all := Methods(services...)
	Seeds(f, all, len(Callers))
	testfuzz.Run(f, func(t *testing.T, method uint16, caller uint8, data []byte) {
		m, who := all[int(method)%len(all)], Callers[int(caller)%len(Callers)]
		call, ctx, conn := Make(m, data), ctx, conns[who.ID]
		if who.Name != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, peer.CallerKey, who.Name)
		}
		for _, role := range who.Roles {
			ctx = metadata.AppendToOutgoingContext(ctx, peer.RolesKey, role)
		}
		may, quiet := allowed(extra, methods.Find(call.Name()), who.ID), time.Duration(0)
		if may {
			quiet = 20 * time.Millisecond
		}
		err := call.Do(ctx, conn, quiet)
		stranger := conn.GetState() == connectivity.Shutdown
		if !stranger {
			call.Judge(t, err)
		}
		refused := err != nil && strings.HasSuffix(err.Error(), fmt.Sprintf("%s: user %q may not call it", call.Name(), who.ID.Name()))
		garbage := status.Code(err) == codes.Internal && strings.Contains(err.Error(), "unmarshal") // grpc reads the message of a unary call before anybody is asked
		switch {
		case !may && !stranger && !refused && !garbage:
			t.Errorf("%s by %s is answered with %v", call.Name(), who, err)
		case may && (stranger || refused):
			t.Errorf("%s by %s, who may call it: %v", call.Name(), who, err)
		}
		if text := s.panicked(); text != "" {
			t.Fatalf("%s by %s: %s", call.Name(), who, text)
		}
	})
}

// await waits until the daemon is ready. What says so tells nobody: it is asked.
func (s *Socket) await(f *testing.F, ended <-chan error) {
	f.Helper()
	tick, late := time.NewTicker(20*time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for !s.Ready() {
		select {
		case err := <-ended:
			f.Fatalf("%s ended: %v", s.name, err)
		case <-late:
			f.Fatalf("%s never became ready", s.name)
		case <-tick.C:
		}
	}
}

// allowed reports who may call a method: what daemon.Serve and peer.Public make of a list, said once more.
func allowed(extra peer.List, m *methods.Method, id uid.ID) bool {
	if own, ok := extra[m.Full()]; ok {
		return slices.Contains(own, id)
	}
	public := m.ServedBy != "" && !slices.Contains(m.Need, authv1.Role_INTERNAL)
	return slices.Contains(extra[m.Service], id) || public && id == uid.Apid || m.Service == controlv1.Control_ServiceDesc.ServiceName && id == uid.Machined
}
