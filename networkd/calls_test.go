package networkd

import (
	"context"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// shared is a model for several goroutines. What it reads is a copy.
type shared struct {
	mu sync.Mutex
	m  *model // guarded by mu
}

func (s *shared) Read(context.Context) (State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.m.State
	have.Links, have.DHCP, have.Files = slices.Clone(have.Links), slices.Clone(have.DHCP), maps.Clone(have.Files)
	for _, tables := range []*[]Table{&have.Tables, &have.Masquerade} {
		*tables = slices.Clone(*tables)
		for i, t := range *tables {
			(*tables)[i].Chains = slices.Clone(t.Chains)
		}
	}
	return have, nil
}

func (s *shared) ReadLinks() (State, error) { return s.Read(context.Background()) }

func (s *shared) Do(ctx context.Context, step Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch step.Op {
	case opAddrHold: // the model of plans knows none of these
		if !slices.ContainsFunc(s.m.Addresses, func(a Address) bool { return a.Prefix == step.Address.Prefix }) {
			s.m.Addresses = append(s.m.Addresses, step.Address)
		}
		return nil
	case opAddrTell:
		return nil
	}
	return s.m.Do(ctx, step)
}

func (s *shared) Run(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return ctx.Err()
}

// FuzzCalls sends random messages to every method of a networkd that has a document, over a model of Linux, as every caller.
func FuzzCalls(f *testing.F) {
	s := testrpc.Listen(f)
	d := newDaemon(Config{Env: s.Env("networkd"), Dir: f.TempDir(), Hostname: "bulkhead-test"}, &shared{m: newModel(eth("eth0", 2), eth("eth1", 3))})
	want := podSpec("10.244.0.0/16", static("10.0.0.3/24", "fd00::3/64"))
	want.VirtualIPs = addresses("10.0.0.7", "fd00::100")
	if err := d.loop.Set(1, want); err != nil {
		f.Fatal(err)
	}
	s.Fuzz(f, d.Run, callers)
}
