package machine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/test/history"
)

// tokenLife is far longer than the test and any clock that still gets an answer is wrong: a token that expired is listed no more.
const tokenLife = 7 * 24 * time.Hour

// doors are the APIs of a cluster's nodes, each at its own port of this host.
type doors struct {
	credentials client.Credentials
	endpoints   map[string]string

	mu  sync.Mutex
	ids map[string]string // guarded by mu; of tokens, by their names
}

func newDoors(t *testing.T, c *cluster) *doors {
	d := &doors{credentials: c.n.credentials(t), endpoints: map[string]string{}, ids: map[string]string{}}
	for _, name := range c.nodes {
		d.endpoints[name] = fmt.Sprintf("127.0.0.1:%d", c.machine(t, name).Port(50000))
	}
	return d
}

// status asks a node over a connection of its own: one that was there before a fault may only look alive.
func (d *doors) status(ctx context.Context, node string) (*etcdv1.Status, error) {
	conn, err := client.Dial(d.endpoints[node], d.credentials)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return etcdv1.NewEtcdClient(conn).GetStatus(ctx, &etcdv1.GetStatusRequest{})
}

// listens waits until somebody answers at a node's port, whoever it says it is.
func (d *doors) listens(ctx context.Context, node string) error {
	dialer := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}} // by this clock its certificate may be none
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		conn, err := dialer.DialContext(try, "tcp", d.endpoints[node])
		cancel()
		if err == nil {
			return conn.Close()
		}
		if hold(ctx, time.Second) != nil {
			return err
		}
	}
}

// open returns the tokens as one client sees them.
func (d *doors) open(int) history.Set { return &tokens{d: d, conns: map[string]*grpc.ClientConn{}} }

// tokens are the cluster's join tokens as a set: "w1-7" is one that was made with this name, "w1-7/later" says that it was revoked.
type tokens struct {
	d     *doors
	conns map[string]*grpc.ClientConn // by node
}

// made tells this test's tokens from those of "up".
var made = regexp.MustCompile(`^w[0-9]+-[0-9]+$`)

// at calls f with a connection to a node. One over which a call failed is not used again.
func (s *tokens) at(node string, f func(trustv1.MembershipClient) error) error {
	conn := s.conns[node]
	if conn == nil {
		var err error
		if conn, err = client.Dial(s.d.endpoints[node], s.d.credentials); err != nil {
			return err
		}
		s.conns[node] = conn
	}
	err := f(trustv1.NewMembershipClient(conn))
	if err != nil {
		delete(s.conns, node)
		return errors.Join(err, conn.Close())
	}
	return nil
}

func (s *tokens) Add(ctx context.Context, node, item string) error {
	return s.at(node, func(c trustv1.MembershipClient) error {
		if name, later := strings.CutSuffix(item, history.Later); later {
			s.d.mu.Lock()
			id := s.d.ids[name]
			s.d.mu.Unlock()
			_, err := c.RevokeJoinToken(ctx, &trustv1.RevokeJoinTokenRequest{Id: id})
			if errs.Is(err, errs.NotFound) {
				return fmt.Errorf("%w: %w", history.ErrStale, err)
			}
			return err
		}
		r, err := c.MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "worker", Name: item, TtlSeconds: uint64(tokenLife / time.Second)})
		if err == nil {
			s.d.mu.Lock()
			s.d.ids[item] = r.GetId()
			s.d.mu.Unlock()
		}
		return err
	})
}

func (s *tokens) List(ctx context.Context, node string) (items []string, err error) {
	err = s.at(node, func(c trustv1.MembershipClient) error {
		r, err := c.ListJoinTokens(ctx, &trustv1.ListJoinTokensRequest{})
		for _, t := range r.GetTokens() {
			if !made.MatchString(t.GetName()) {
				continue
			}
			items = append(items, t.GetName())
			if t.GetState() == "revoked" {
				items = append(items, t.GetName()+history.Later)
			}
		}
		return err
	})
	return items, err
}
