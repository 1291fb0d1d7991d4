package testrpc

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Callers are who may connect to a daemon's socket.
var Callers = []uid.ID{uid.Apid, uid.Machined, uid.Etcdd, uid.Kubeletd, uid.Trustd, uid.Networkd, uid.Storaged, uid.Timed, uid.Updated, uid.Gateway, uid.KubeAPIServer}

// A Socket is where a daemon under test listens. All callers are one user in a test: who connects is whom the target says.
type Socket struct {
	net.Listener
	path string
	who  atomic.Uint32
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

// Fuzz sends random messages to every method of the services, as every caller, to a daemon that run serves on the socket until its context is done.
// Besides what Judge wants, only apid, those of extra, and machined for control.v1 ever get an answer that is no error.
func (s *Socket) Fuzz(f *testing.F, run func(context.Context) error, extra peer.List, services ...string) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	f.Cleanup(func() { cancel(); <-done })
	conns := map[uid.ID]*grpc.ClientConn{}
	for _, id := range Callers {
		s.who.Store(uint32(id))
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
		conns[id] = conn
	}
	methods := Methods(services...)
	Seeds(f, methods, len(Callers))
	testfuzz.Run(f, func(t *testing.T, method uint16, caller uint8, data []byte) {
		m, id := methods[int(method)%len(methods)], Callers[int(caller)%len(Callers)]
		c := Make(m, data)
		err := c.Do(ctx, conns[id], 20*time.Millisecond)
		if conns[id].GetState() != connectivity.Shutdown {
			c.Judge(t, err)
		}
		service := string(m.Parent().FullName())
		may := id == uid.Apid || slices.Contains(extra[c.Name()], id) || slices.Contains(extra[service], id) ||
			service == controlv1.Control_ServiceDesc.ServiceName && id == uid.Machined
		if err == nil && !may {
			t.Errorf("%s by %s is answered", c.Name(), id.Name())
		}
	})
}
