package apid

import (
	"slices"
	"sync"

	"google.golang.org/grpc"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

const (
	// A daemon takes 256 calls at once on one connection (internal/daemon): with more, all others would wait for those who only watch.
	perBackend   = 240
	backendConns = 64
)

// backend is a daemon of this node. Its first connection is always there; more are opened for calls that it does not take, and closed with the last of these.
type backend struct {
	path string
	base *slot

	mu   sync.Mutex
	more []*slot // guarded by mu
}

// slot is one connection.
type slot struct {
	conn *grpc.ClientConn
	busy int // calls; guarded by backend.mu
}

func newBackend(path string) (*backend, error) {
	conn, err := peer.Dial(path, backendOptions()...)
	return &backend{path: path, base: &slot{conn: conn}}, err
}

// first is a connection for calls of apid's own, which are few.
func (b *backend) first() *grpc.ClientConn { return b.base.conn }

// take returns a connection for one call; give ends it.
func (b *backend) take() (*slot, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.base.busy < perBackend {
		b.base.busy++
		return b.base, nil
	}
	for _, s := range b.more {
		if s.busy < perBackend {
			s.busy++
			return s, nil
		}
	}
	if len(b.more) == backendConns-1 {
		return nil, errs.New(errs.Exhausted, "%d calls at once go to this daemon already, which is the limit; end some that watch or follow", backendConns*perBackend)
	}
	conn, err := peer.Dial(b.path, backendOptions()...)
	if err != nil {
		return nil, err
	}
	s := &slot{conn: conn, busy: 1}
	b.more = append(b.more, s)
	return s, nil
}

// give ends the call for which take returned s.
func (b *backend) give(s *slot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.busy--; s.busy > 0 || s == b.base {
		return
	}
	b.more = slices.DeleteFunc(b.more, func(o *slot) bool { return o == s })
	_ = s.conn.Close() // no call is on it
}

// close ends all connections, and the calls on them.
func (b *backend) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range append(b.more, b.base) {
		_ = s.conn.Close() // apid ends
	}
}
