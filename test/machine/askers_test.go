package machine

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Every asker's call has askLimit to be answered, and the next one begins askPause later.
const (
	askLimit = 10 * time.Second
	askPause = 500 * time.Millisecond
)

// An asker makes the same small call all the time; who is the daemon that has to answer.
type asker struct {
	who  string
	call func(context.Context) error
}

// askers are all of them. A call may fail only if its daemon was excused when it began or when it ended. The zero value has nobody.
type askers struct {
	mu      sync.Mutex
	excused map[string]bool     // guarded by mu, as all below
	failed  []string            // calls that had to be answered, and why they were not
	heard   map[string][]string // by daemon, what calls said that failed while it was excused
	count   map[string]int      // calls that were answered
	slowest map[string]time.Duration
}

// run goes on until ctx is done.
func (a *askers) run(ctx context.Context, all []asker) {
	a.heard, a.count, a.slowest = map[string][]string{}, map[string]int{}, map[string]time.Duration{}
	var wait sync.WaitGroup
	for _, k := range all {
		wait.Go(func() {
			for hold(ctx, askPause) == nil {
				a.ask(ctx, k)
			}
		})
	}
	wait.Wait()
}

func (a *askers) ask(ctx context.Context, k asker) {
	excused := a.isExcused(k.who)
	limit, cancel := context.WithTimeout(ctx, askLimit)
	start := time.Now()
	err := k.call(limit)
	took := time.Since(start)
	cancel()
	if ctx.Err() != nil {
		return
	}
	excused = a.isExcused(k.who) || excused
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err == nil:
		a.count[k.who]++
		a.slowest[k.who] = max(a.slowest[k.who], took)
	case excused:
		a.heard[k.who] = append(a.heard[k.who], err.Error())
	default:
		a.failed = append(a.failed, fmt.Sprintf("%s at %s, after %s: %v", k.who, start.Format(time.TimeOnly), took.Round(10*time.Millisecond), err))
	}
}

func (a *askers) isExcused(who string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.excused[who]
}

// excuse is who need not answer from now on; nobody else.
func (a *askers) excuse(who ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.excused, a.heard = map[string]bool{}, map[string][]string{}
	for _, w := range who {
		a.excused[w] = true
	}
}

// takeFailed returns what failed since it was called last.
func (a *askers) takeFailed() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.failed
	a.failed = nil
	return out
}

// hears returns what excused calls have said since somebody was excused last.
func (a *askers) hears() map[string][]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.heard)
}

func (a *askers) report(t *testing.T) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	var text []string
	for who, n := range a.count {
		text = append(text, fmt.Sprintf("%s %d (slowest %s)", who, n, a.slowest[who].Round(10*time.Millisecond)))
	}
	slices.Sort(text)
	t.Logf("» answered: %s", strings.Join(text, ", "))
}
