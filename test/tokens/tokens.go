// Package tokens is a cluster's join tokens as a set that package history can judge: each is a key in etcd that clients make, change and list through the API of any control plane.
package tokens

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/test/history"
)

// Most is how many a cluster may be asked to make: below what it keeps (roster.maxTokens), with room for those by which its nodes joined.
const Most = 900

// life is far longer than any test, and than any clock is wrong that still gets an answer: a token that expired is listed no more.
const life = 7 * 24 * time.Hour

// made tells tokens of a history from others.
var made = regexp.MustCompile(`^w[0-9]+-[0-9]+$`)

// Doors are the APIs of a cluster's control planes. Make it with New; it is safe for concurrent use.
type Doors struct {
	endpoints map[string]string

	mu          sync.Mutex
	credentials client.Credentials // guarded by mu
	renewed     int                // guarded by mu; how often there were others
	ids         map[string]string  // guarded by mu; of tokens, by their names
}

// New returns doors for an administrator; endpoints are by the nodes' names.
func New(credentials client.Credentials, endpoints map[string]string) *Doors {
	return &Doors{credentials: credentials, endpoints: endpoints, ids: map[string]string{}}
}

// Renew has clients use other credentials, over other connections, from their next operation on.
func (d *Doors) Renew(c client.Credentials) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.credentials = c
	d.renewed++
}

// now returns the credentials, and how often they were renewed.
func (d *Doors) now() (client.Credentials, int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.credentials, d.renewed
}

// Open returns the tokens as one client sees them: "w1-7" is one that was made with this name, and "w1-7/later" says that it was revoked.
func (d *Doors) Open(int) history.Set { return &set{d: d, conns: map[string]*grpc.ClientConn{}} }

// Dial returns a connection of its own to a node: one that was there before a fault may only look alive. The caller closes it.
func (d *Doors) Dial(node string) (*grpc.ClientConn, error) {
	c, _ := d.now()
	return client.Dial(d.endpoints[node], c)
}

// Endpoint is where a node's API is.
func (d *Doors) Endpoint(node string) string { return d.endpoints[node] }

type set struct {
	d       *Doors
	renewed int                         // of the credentials of conns
	conns   map[string]*grpc.ClientConn // by node
}

// at calls f with a connection to a node. One over which a call failed is not used again.
func (s *set) at(node string, f func(trustv1.MembershipClient) error) error {
	if _, renewed := s.d.now(); renewed != s.renewed {
		for _, c := range s.conns {
			if err := c.Close(); err != nil {
				return err
			}
		}
		clear(s.conns)
		s.renewed = renewed
	}
	conn := s.conns[node]
	if conn == nil {
		var err error
		if conn, err = s.d.Dial(node); err != nil {
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

func (s *set) Add(ctx context.Context, node, item string) error {
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
		r, err := c.MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "worker", Name: item, TtlSeconds: uint64(life / time.Second)})
		if err == nil {
			s.d.mu.Lock()
			s.d.ids[item] = r.GetId()
			s.d.mu.Unlock()
		}
		return err
	})
}

func (s *set) List(ctx context.Context, node string) (items []string, err error) {
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
