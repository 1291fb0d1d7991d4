package roster

import (
	"context"
	"encoding/json"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	// patience is how long one call to the store may take. While the node's etcd member restarts on purpose its calls wait, for a second or two, and on a busy machine for several.
	patience = 10 * time.Second
	// tries bounds how often a change is decided anew because somebody else was first.
	tries = 8
	// keepToken is how long a token is remembered after it expired, so that who comes late hears why.
	keepToken = 24 * time.Hour
	// keepRevoked is longer than anything lives that can be revoked.
	keepRevoked = 366 * 24 * time.Hour
)

// Roster reads and changes the list. The zero value has no store.
type Roster struct{ Store storev1.StoreClient }

// Read returns the list as it is now in the whole cluster. Unavailable: etcd does not answer, or has no quorum.
func (r Roster) Read(ctx context.Context) (*State, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	resp, err := r.Store.Read(ctx, &storev1.ReadRequest{Prefix: Prefix})
	if err != nil {
		return nil, away(err)
	}
	entries := map[string]*storev1.Entry{}
	for _, e := range resp.GetEntries() {
		entries[e.GetKey()] = e
	}
	return parse(entries), nil
}

// Watch calls f with the list, and again after each change, until ctx is done or the store is lost.
func (r Roster) Watch(ctx context.Context, f func(*State)) error {
	stream, err := r.Store.Watch(ctx, &storev1.WatchRequest{Prefix: Prefix})
	if err != nil {
		return err
	}
	entries := map[string]*storev1.Entry{}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if resp.GetComplete() {
			clear(entries)
		}
		for _, key := range resp.GetDeleted() {
			delete(entries, key)
		}
		for _, e := range resp.GetEntries() {
			entries[e.GetKey()] = e
		}
		f(parse(entries))
	}
}

// change is a transaction in the making.
type change struct {
	r   storev1.WriteRequest
	err error
}

// put writes a key that has the revision, 0 for none.
func (c *change) put(key string, revision uint64, value any, ttl time.Duration) {
	data, err := json.Marshal(value)
	if err != nil {
		c.err = err
	}
	c.when(key, revision)
	c.r.Changes = append(c.r.Changes, &storev1.Change{Key: key, Value: data, TtlSeconds: uint64(ttl / time.Second)})
}

func (c *change) drop(key string, revision uint64) {
	c.when(key, revision)
	c.r.Changes = append(c.r.Changes, &storev1.Change{Key: key, Delete: true})
}

func (c *change) when(key string, revision uint64) {
	c.r.Conditions = append(c.r.Conditions, &storev1.Condition{Key: key, Revision: revision})
}

// update reads, lets f decide on what is there, and writes if that is still so; if not, f decides anew. A nil change is none.
func (r Roster) update(ctx context.Context, f func(*State) (*change, error)) error {
	for range tries {
		s, err := r.Read(ctx)
		if err != nil {
			return err
		}
		c, err := f(s)
		if err != nil || c == nil {
			return err
		}
		if err = r.write(ctx, c); !errs.Is(err, errs.Conflict) {
			return err
		}
	}
	return errs.New(errs.Unavailable, "the cluster's list of nodes changes all the time; try again")
}

func (r Roster) write(ctx context.Context, c *change) error {
	if c.err != nil {
		return c.err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := r.Store.Write(ctx, &c.r)
	return away(err)
}

// away tells people what it means that the store does not answer.
func away(err error) error {
	if err == nil || errs.Is(err, errs.Conflict) {
		return err
	}
	return errs.New(errs.Unavailable, "the cluster's list of nodes in etcd cannot be read or written now; see the status of etcd: %s", errs.Text(err))
}

// Join admits a node, in one transaction with using up its token, and returns its record and the list with it.
func (r Roster) Join(ctx context.Context, a Applicant, now time.Time) (n Node, after *State, err error) {
	err = r.update(ctx, func(s *State) (*change, error) {
		var t Token
		var changed bool
		if n, t, changed, err = Admit(s, a, now); err != nil {
			return nil, err
		}
		after = s.With(n)
		if !changed {
			return nil, nil
		}
		c := &change{}
		c.put(tokens+t.ID, t.revision, t, t.Expires.Sub(now)+keepToken)
		c.put(nodes+n.Name, 0, n, 0)
		c.when(removed+n.Key, 0)
		return c, nil
	})
	return n, after, err
}

// AddToken keeps a new token.
func (r Roster) AddToken(ctx context.Context, t Token, now time.Time) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if _, ok := s.Nodes[t.Name]; ok && t.Name != "" {
			return nil, errs.New(errs.Exists, "name: the cluster has a node called %q already; remove it first", t.Name)
		}
		if len(s.Tokens) >= maxTokens {
			return nil, errs.New(errs.Exhausted, "the cluster keeps %d join tokens, which is the limit; they go a day after they expired", maxTokens)
		}
		c := &change{}
		c.put(tokens+t.ID, 0, t, t.Expires.Sub(now)+keepToken)
		return c, nil
	})
}

// maxTokens bounds what administrators can fill etcd with.
const maxTokens = 1_000

// RevokeToken makes a token void. A used one stays used.
func (r Roster) RevokeToken(ctx context.Context, id string, now time.Time) error {
	return r.update(ctx, func(s *State) (*change, error) {
		t, ok := s.Tokens[id]
		if !ok {
			return nil, errs.New(errs.NotFound, "there is no join token %.64q", id)
		}
		if t.State != Unused {
			return nil, nil
		}
		t.State = Revoked
		c := &change{}
		c.put(tokens+id, t.revision, t, max(t.Expires.Sub(now), 0)+keepToken)
		return c, nil
	})
}

// Remove takes a node off the list, for good: its key is not let in again. check says whether it may be removed. One that was removed before is no error.
func (r Roster) Remove(ctx context.Context, name, by string, now time.Time, check func(Node) error) error {
	return r.update(ctx, func(s *State) (*change, error) {
		n, ok := s.Nodes[name]
		if !ok {
			for _, was := range s.Removed {
				if was == name {
					return nil, nil
				}
			}
			return nil, errs.New(errs.NotFound, "the cluster has no node called %.64q", name)
		}
		if err := check(n); err != nil {
			return nil, err
		}
		c := &change{}
		c.drop(nodes+name, n.revision)
		c.put(removed+n.Key, 0, note{By: by, At: now, Name: name}, 0)
		return c, nil
	})
}

// Revoke makes a certificate or bearer token void.
func (r Roster) Revoke(ctx context.Context, id, by string, now time.Time) error {
	return r.update(ctx, func(s *State) (*change, error) {
		for _, have := range s.Revoked {
			if have == id {
				return nil, nil
			}
		}
		c := &change{}
		c.put(revoked+id, 0, note{By: by, At: now}, keepRevoked)
		return c, nil
	})
}

// Keep writes a control plane's own record if that is needed.
func (r Roster) Keep(ctx context.Context, me Node, instance string, addresses []string) error {
	return r.update(ctx, func(s *State) (*change, error) {
		write, drop, err := Own(s, me, instance, addresses)
		if err != nil || write.Name == "" {
			return nil, err
		}
		c := &change{}
		c.put(nodes+write.Name, write.revision, write, 0)
		c.when(removed+write.Key, 0)
		for _, old := range drop {
			c.drop(nodes+old.Name, old.revision)
		}
		return c, nil
	})
}

// Meet notes that a run of a node's trustd called from an address, if it is still the node that the caller knows. Denied: see Node.Meet.
func (r Roster) Meet(ctx context.Context, known Node, instance, address string) error {
	return r.update(ctx, func(s *State) (*change, error) {
		n, ok := s.Nodes[known.Name]
		if !ok || n.Key != known.Key {
			return nil, nil
		}
		n, changed, err := n.Meet(instance, address)
		if err != nil || !changed {
			return nil, err
		}
		c := &change{}
		c.put(nodes+n.Name, n.revision, n, 0)
		return c, nil
	})
}
