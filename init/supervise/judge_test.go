package supervise

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

// A judge is a unit of the PID 1 that it puts to the test. It knows units by what PID 1 says of them, and processes by /proc.
type judge struct {
	*endurance
	client *initctl.Client

	mu      sync.Mutex
	units   map[string]initctl.Status // guarded by mu: the newest of each
	changed chan bool                 // guarded by mu: closed at every change
	zombies map[string]time.Time      // guarded by mu: when each was first seen
	old     int                       // guarded by mu: zombies seen for longer than a second
	slowest time.Duration             // guarded by mu: of all answers
}

// lost is how long anything may take before it counts as lost. The longest pause before a restart is ten seconds.
const lost = 40 * time.Second

func (j *judge) wrong(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.endurance.wrong(format, args...)
}

func (e *endurance) asJudge() {
	j := &judge{endurance: e, units: map[string]initctl.Status{}, changed: make(chan bool), zombies: map[string]time.Time{}}
	var err error
	if j.client, err = initctl.Dial(e.socket()); err != nil {
		e.wrong("%v", err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	var watchers sync.WaitGroup
	watchers.Go(func() {
		if err := j.client.Watch(ctx, j.hear); ctx.Err() == nil {
			j.wrong("watch: %v", err)
		}
	})
	watchers.Go(func() { every(ctx, 100*time.Millisecond, j.lookForZombies) })
	watchers.Go(func() { every(ctx, 20*time.Millisecond, j.ask) })

	j.settle()
	j.round() // Go's heap has its usual size after it
	before := j.figures()
	j.round()
	j.compare(before)
	cancel()
	watchers.Wait()
	if j.old > 0 {
		j.wrong("%d looks at a zombie that is older than a second", j.old)
	}
	if limit := 4 * time.Second; j.slowest > limit {
		j.wrong("PID 1 took %v for an answer, want %v at most", j.slowest, limit)
	}
	e.note("slowest answer of PID 1 %.1f ms", j.slowest.Seconds()*1000)
}

// round is half of all that PID 1 is put through. The second one must leave no trace.
func (j *judge) round() {
	var work sync.WaitGroup
	work.Go(func() { j.kills(j.Kills / 2) })
	work.Go(j.orphans)
	work.Go(j.hostile)
	work.Wait()
	j.settle()
}

// settle waits until every worker is up.
func (j *judge) settle() {
	for i := range j.Workers {
		j.await(worker(i), "come up", func(s initctl.Status) bool { return s.State == "up" })
	}
}

func every(ctx context.Context, d time.Duration, f func()) {
	for t := time.NewTicker(d); ; {
		select {
		case <-t.C:
			f()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

func (j *judge) hear(s initctl.Status) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.units[s.Name] = s
	close(j.changed)
	j.changed = make(chan bool)
}

// await returns the unit when it is as it shall be; else it is a restart that was lost, or the like.
func (j *judge) await(name, what string, ok func(initctl.Status) bool) (initctl.Status, bool) {
	for end := time.After(lost); ; {
		j.mu.Lock()
		s, changed := j.units[name], j.changed
		j.mu.Unlock()
		if ok(s) {
			return s, true
		}
		select {
		case <-changed:
		case <-end:
			j.wrong("%s: %s: not within %v; it is %+v", name, what, lost, s)
			return s, false
		}
	}
}

func (j *judge) order(what string, err error) {
	if err != nil {
		j.wrong("%s: %v", what, err)
	}
}

func (j *judge) ask() {
	start := time.Now()
	_, err := j.client.Status()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.slowest = max(j.slowest, time.Since(start))
	if err != nil {
		j.endurance.wrong("status: %v", err)
	}
}

// kills has every worker killed at random moments, so often in all. Each kill must be followed by one restart, exactly.
func (j *judge) kills(all int) {
	var work sync.WaitGroup
	for i := range j.Workers {
		n := all / j.Workers
		if i < all%j.Workers {
			n++
		}
		work.Go(func() { j.killOne(worker(i), n, rand.New(rand.NewPCG(uint64(i), uint64(n)))) })
	}
	work.Wait()
}

func (j *judge) killOne(name string, n int, random *rand.Rand) {
	alive := func(s initctl.Status) bool { return s.PID != 0 && (s.State == "up" || s.State == "starting") }
	for i := range n {
		s, ok := j.await(name, "a process to kill", alive)
		if !ok {
			return
		}
		if wait := time.Duration(random.IntN(4)) * time.Millisecond; wait > 0 {
			<-time.After(wait)
		}
		signal := []unix.Signal{unix.SIGKILL, unix.SIGKILL, unix.SIGTERM, unix.SIGSEGV}[random.IntN(4)]
		if err := unix.Kill(s.PID, signal); err != nil {
			j.wrong("%s: kill %d: %v", name, s.PID, err)
			return
		}
		again, ok := j.await(name, "a restart", func(now initctl.Status) bool { return alive(now) && now.PID != s.PID })
		if !ok {
			return
		}
		if again.Restarts != s.Restarts+1 {
			j.wrong("%s: %d restarts after one kill, pid %d and then %d", name, again.Restarts-s.Restarts, s.PID, again.PID)
			return
		}
		if i%2 == 1 { // a clean record, so that the pauses stay short
			j.order("stop", j.client.Stop(name))
			j.await(name, "stop", func(s initctl.Status) bool { return s.State == "down" })
			j.order("start", j.client.Start(name))
		}
	}
}

// orphans has them made. PID 1 counts them.
func (j *judge) orphans() {
	started := time.Now()
	for i := range orphaners {
		j.order("start", j.client.Start(orphaner(i)))
	}
	for i := range orphaners {
		for { // it may take longer than anything else
			s := j.units1(orphaner(i))
			if s.State == "down" && s.LastExit != "" && s.Since.After(started) {
				if s.LastExit != "exit 0" {
					j.wrong("%s: %s", s.Name, s.LastExit)
				}
				break
			}
			<-time.After(10 * time.Millisecond)
		}
	}
}

func (j *judge) units1(name string) initctl.Status {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.units[name]
}

// hostile starts the units that misbehave, lets them, looks at what PID 1 makes of it, and stops them.
func (j *judge) hostile() {
	names := []string{"forker", "stubborn", "loud", "never", "closer", "babbler", "flapper", "missing"}
	restarts := map[string]uint32{}
	for _, n := range names {
		restarts[n] = j.units1(n).Restarts
		j.order("start", j.client.Start(n))
	}
	is := func(state string) func(initctl.Status) bool {
		return func(s initctl.Status) bool { return s.State == state }
	}
	loud, _ := j.await("loud", "start", is("up"))
	j.await("stubborn", "start", is("up"))
	started := time.Now()
	<-time.After(j.Hostile / 2)
	// Never held up by a log that nobody reads: a pipe is at most 1 MiB.
	if written := number(fmt.Sprintf("/proc/%d/io", loud.PID), "wchar:"); written < 5<<19 {
		j.wrong("loud has written %d bytes only: it was held up", written)
	}
	// Killed for being late, or ended by itself: again and again, with pauses that double up to ten seconds.
	for _, n := range []string{"never", "closer", "babbler", "flapper", "missing"} {
		s, ok := j.await(n, "third restart", func(s initctl.Status) bool { return s.Restarts >= restarts[n]+3 })
		most := uint32(8 + time.Since(started)/(10*time.Second))
		if again := s.Restarts - restarts[n]; ok && again > most {
			j.wrong("%s was started again %d times in %v, want %d at most", n, again, time.Since(started), most)
		}
	}
	for n, want := range map[string]string{"never": "killed by SIGKILL", "closer": "killed by SIGKILL", "flapper": "exit 1", "missing": "not started: no such file or directory"} {
		if s := j.units1(n); s.LastExit != want {
			j.wrong("%s: last %q, want %q", n, s.LastExit, want)
		}
	}
	for _, n := range names {
		group := j.units1(n).PID
		j.order("stop", j.client.Stop(n))
		j.await(n, "stop", is("down"))
		if n == "forker" && len(grouped(group)) > 0 {
			<-time.After(200 * time.Millisecond) // killed, and not reaped yet
			if left := grouped(group); len(left) > 0 {
				j.wrong("forker left %v", left)
			}
		}
	}
	if s := j.units1("stubborn"); s.LastExit != "killed by SIGKILL" {
		j.wrong("stubborn: %q", s.LastExit)
	}
}

// Figures are what must be the same before and after.
type figures struct{ descriptors, anonymous, threads int }

func (j *judge) figures() figures {
	all, _ := os.ReadDir("/proc/1/fd")
	return figures{len(all), number("/proc/1/status", "RssAnon:"), number("/proc/1/status", "Threads:")}
}

// compare looks whether PID 1 has grown.
func (j *judge) compare(before figures) {
	after := j.figures()
	for end := time.Now().Add(5 * time.Second); after.descriptors != before.descriptors && time.Now().Before(end); after = j.figures() {
		<-time.After(50 * time.Millisecond) // a watcher's request may be under way
	}
	if after.descriptors != before.descriptors {
		j.wrong("PID 1 had %d descriptors and has %d: %v", before.descriptors, after.descriptors, descriptors())
	}
	growth := 1024 // KiB
	if j.Short {
		growth = 16 << 10 // the race detector is most of it
	}
	if after.anonymous > before.anonymous+growth {
		j.wrong("PID 1 had %d KiB and has %d", before.anonymous, after.anonymous)
	}
	j.note("PID 1: descriptors %d and %d, memory %d and %d KiB, threads %d and %d", before.descriptors, after.descriptors,
		before.anonymous, after.anonymous, before.threads, after.threads)
}

func descriptors() (all []string) {
	entries, _ := os.ReadDir("/proc/1/fd")
	for _, e := range entries {
		to, _ := os.Readlink("/proc/1/fd/" + e.Name())
		all = append(all, e.Name()+"="+to)
	}
	return all
}

func number(path, field string) int {
	text, _ := os.ReadFile(path)
	_, rest, _ := strings.Cut(string(text), field)
	if f := strings.Fields(rest); len(f) > 0 {
		n, _ := strconv.Atoi(f[0])
		return n
	}
	return -1
}

// A process1 is a process of the namespace, as /proc/PID/stat says.
type process1 struct {
	PID, Parent, Group int
	Name, State, Start string
}

func processes1() (all []process1) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, _ := os.ReadFile("/proc/" + e.Name() + "/stat")
		left, right, _ := strings.Cut(string(text), ") ")
		_, name, _ := strings.Cut(left, " (")
		if f := strings.Fields(right); len(f) > 19 {
			p := process1{PID: pid, Name: name, State: f[0], Start: f[19]}
			p.Parent, _ = strconv.Atoi(f[1])
			p.Group, _ = strconv.Atoi(f[2])
			all = append(all, p)
		}
	}
	return all
}

func grouped(group int) []process1 {
	return slices.DeleteFunc(processes1(), func(p process1) bool { return p.Group != group || p.State == "Z" })
}

func (j *judge) lookForZombies() {
	all, now := processes1(), time.Now()
	j.mu.Lock()
	defer j.mu.Unlock()
	seen := map[string]time.Time{}
	for _, p := range all {
		if p.State != "Z" || p.Parent != 1 {
			continue
		}
		key := fmt.Sprint(p.PID, " ", p.Start)
		first, known := j.zombies[key]
		if !known {
			first = now
		}
		if seen[key] = first; now.Sub(first) > time.Second {
			j.old++
		}
	}
	j.zombies = seen
}
