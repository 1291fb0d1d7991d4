package machine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// A pulse does the same small thing all the time, through several doors at once, and notes when it succeeded. A new try begins each Every whether or not the ones before
// are over, so one that hangs hides nothing. The zero value with its exported fields set is ready.
type pulse struct {
	Every, Limit time.Duration // between two tries of a door; and of one try
	Slow         int           // times that the machines' clocks are slower; 0: they are not
	// Try says who answered, if that can be told.
	Try func(ctx context.Context, door string) (who string, err error)

	mu    sync.Mutex
	beats []beat           // guarded by mu; that succeeded
	last  map[string]error // guarded by mu; by door, of the newest try that failed
	tries sync.WaitGroup
	stop  context.CancelFunc
}

// beat is one success.
type beat struct {
	door, who    string
	began, ended time.Time
}

// start begins; the caller calls end.
func (p *pulse) start(ctx context.Context, doors ...string) {
	ctx, p.stop = context.WithCancel(ctx)
	p.last = map[string]error{}
	for _, door := range doors {
		p.tries.Go(func() {
			tick := time.NewTicker(p.Every)
			defer tick.Stop()
			for {
				p.tries.Go(func() { p.try(ctx, door) })
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
}

// end waits for all tries.
func (p *pulse) end() {
	p.stop()
	p.tries.Wait()
}

func (p *pulse) try(ctx context.Context, door string) {
	ctx, cancel := context.WithTimeout(ctx, p.Limit)
	defer cancel()
	b := beat{door: door, began: time.Now()}
	var err error
	b.who, err = p.Try(ctx, door)
	b.ended = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.last[door] = err
		return
	}
	p.beats = append(p.beats, b)
}

// after returns the success that ended first of those that began after a moment and that ok likes.
func (p *pulse) after(at time.Time, ok func(beat) bool) (beat, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first beat
	for _, b := range p.beats {
		if b.began.After(at) && ok(b) && (first.door == "" || b.ended.Before(first.ended)) {
			first = b
		}
	}
	if first.door == "" {
		return first, fmt.Errorf("nothing succeeds; last: %v", p.last)
	}
	return first, nil
}

// usual is the median time that what succeeded took, of what was over by a moment, and how many those were.
func (p *pulse) usual(by time.Time) (time.Duration, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var took []time.Duration
	for _, b := range p.beats {
		if !b.ended.After(by) {
			took = append(took, b.ended.Sub(b.began))
		}
	}
	if len(took) == 0 {
		return 0, 0
	}
	slices.Sort(took)
	return took[len(took)/2], len(took)
}

func anyBeat(beat) bool { return true }

// beatsAt waits until each door has had a success that began after a moment.
func (p *pulse) beatsAt(t *testing.T, limit time.Duration, what string, at time.Time, doors ...string) {
	t.Helper()
	eventually(t, limit, what, func() error {
		for _, door := range doors {
			if _, err := p.after(at, func(b beat) bool { return b.door == door }); err != nil {
				return fmt.Errorf("%s: %w", door, err)
			}
		}
		return nil
	})
}

// Bounds of losing the leader. The design's is for real machines; three of them on two cores that other processes use, too, take their time to see that one is gone.
const (
	leaderBudget   = 5 * time.Second
	leaderEmulated = time.Minute
)

// tokenWrites are writes to etcd by the node's own API: join tokens, made at each control plane over a connection that is there. They stop when the test does.
func (c *cluster) tokenWrites(t *testing.T, slow int) *pulse {
	t.Helper()
	doors := map[string]trustv1.MembershipClient{}
	for _, name := range c.nodes[:3] {
		conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", c.machine(t, name).Port(50000)), c.n.credentials(t))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		doors[name] = trustv1.NewMembershipClient(conn)
	}
	return &pulse{Every: time.Duration(slow) * 500 * time.Millisecond, Limit: time.Duration(slow) * 10 * time.Second, Slow: slow, Try: func(ctx context.Context, door string) (string, error) {
		_, err := doors[door].MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "worker", TtlSeconds: 600})
		return door, err
	}}
}

// death is a machine whose power was cut between two moments.
type death struct {
	machine        string
	struck, proved time.Time
}

// dies cuts a machine's power.
func (c *cluster) dies(t *testing.T, name string) death {
	t.Helper()
	d := death{machine: name, struck: time.Now()}
	if err := c.machine(t, name).Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.proved = time.Now()
	return d
}

// times is how many times slower the machines' clocks are.
func (p *pulse) times() time.Duration { return time.Duration(max(1, p.Slow)) }

// since is how long after a death something succeeded, in the machines' time.
func (p *pulse) since(d death, b beat) time.Duration {
	return b.ended.Sub(d.struck) / p.times()
}

// takesOver waits for the first write at another machine that begins when one is surely dead, and returns how long after the cut it was acknowledged.
func (p *pulse) takesOver(t *testing.T, what string, d death) time.Duration {
	t.Helper()
	var b beat
	eventually(t, p.times()*leaderEmulated, what+" are accepted again", func() (err error) {
		b, err = p.after(d.proved, func(b beat) bool { return b.door != d.machine })
		return err
	})
	usual, n := p.usual(d.struck)
	took := p.since(d, b)
	t.Logf("» %s: accepted again at %s %s after %s died (budget %s on real machines); one took %s before, the median of %d", what, b.door, took.Round(10*time.Millisecond), d.machine, leaderBudget, (usual / p.times()).Round(time.Millisecond), n)
	return took
}

// A pulse finds the first success that began after a death, also while tries before it hang.
func TestPulseIsAccurate(t *testing.T) {
	var mu sync.Mutex
	dead := ""
	kill := func(door string) { mu.Lock(); defer mu.Unlock(); dead = door }
	p := &pulse{Every: 5 * time.Millisecond, Limit: 10 * time.Second, Try: func(ctx context.Context, door string) (string, error) {
		mu.Lock()
		hangs := door == dead
		mu.Unlock()
		if hangs {
			<-ctx.Done()
			return "", errors.New("no answer")
		}
		return door, nil
	}}
	p.start(t.Context(), "a", "b")
	p.beatsAt(t, 10*time.Second, "both doors", time.Time{}, "a", "b")
	kill("a")
	died := time.Now()
	p.beatsAt(t, 10*time.Second, "b goes on", died, "b")
	if b, err := p.after(died, anyBeat); err != nil || b.who != "b" || b.began.Before(died) {
		t.Errorf("after the death: %+v, %v", b, err)
	}
	if b, err := p.after(died, func(b beat) bool { return b.door == "a" }); err == nil {
		t.Errorf("a answers: %+v", b)
	}
	p.end()
	if took, n := p.usual(died); n < 2 || took > time.Second {
		t.Errorf("usual: %s of %d", took, n)
	}
}
