package machine

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/test/judge"
)

// TestCutDisk records every write and flush of a real node's disk, from its first start to an upgrade and back, rebuilds the disk as a power cut would have
// left it (at every flush, and with random parts of what was written since the last one), and looks at each what would start and what configuration would be found. Some
// of them it really boots, to see whether the node agrees. What a disk may lose is what it was not told to flush: sectors of 512 bytes, in any combination.
//
// BULKHEAD_CUT_STATES and BULKHEAD_CUT_BOOTS make it longer. BULKHEAD_CUT_STORY names a folder that keeps the recording, and from which it is taken if it is there.
// BULKHEAD_CUT_ONLY boots the one state that it names, as FLUSH/STATE.
func TestCutDisk(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	start := time.Now()
	r := &rebuilding{n: n, states: number("BULKHEAD_CUT_STATES", 2000), boots: number("BULKHEAD_CUT_BOOTS", 5), count: map[string]*tally{}}
	r.prepare(t)
	t.Logf("» recorded %d events, %d flushes, after %s", len(r.rec.Events), r.flushes, time.Since(start).Round(time.Second))
	start = time.Now()
	r.first(t)
	t.Logf("» the recording leads to the disk that the machine has left, after %s", time.Since(start).Round(time.Second))
	start = time.Now()
	r.judgeAll(t)
	total, extra := 0, 0
	for _, m := range r.order {
		c := r.count[m]
		if total += c.states; m == secondCut {
			extra = c.states
		}
		t.Logf("» %-24s %5d states (%d flushes), %d boots: %v", m, c.states, c.flushes, c.boots, c.found)
	}
	t.Logf("» %d states, %d boots, after %s: %d bad", total, r.booted, time.Since(start).Round(time.Second), r.bad)
	if os.Getenv("BULKHEAD_CUT_ONLY") == "" && (total-extra < r.states || r.booted < r.boots) {
		t.Errorf("only %d states of %d, and %d boots of %d", total, r.states, r.booted, r.boots)
	}
}

// number reads one from the environment.
func number(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil && n >= 0 {
		return n
	}
	return otherwise
}

// A rebuilding is the second half of the test: all that is done with a recording.
type rebuilding struct {
	n             *node
	s             *story
	rec           *powercut.Recording
	judge         *judge.Judge
	states, boots int // wanted
	flushes       int
	owner         string // that the disk had in the end

	booted  int
	repairs int // of those, which needed e2fsck

	mu       sync.Mutex
	order    []string          // guarded by mu; of the operations
	count    map[string]*tally // guarded by mu; by operation
	bad      int               // guarded by mu
	repaired int               // guarded by mu; a state of this interval that needed e2fsck, 0: none
}

// A tally is what was seen of one operation.
type tally struct {
	states, flushes, boots int
	found                  map[string]int
}

// prepare gets the recording.
func (r *rebuilding) prepare(t *testing.T) {
	dir := os.Getenv("BULKHEAD_CUT_STORY")
	if _, err := os.Stat(filepath.Join(dir, storyFile)); dir != "" && err == nil {
		r.s = loadStory(t, dir)
		credentials, err := os.ReadFile(filepath.Join(dir, "config.yaml"))
		if err == nil {
			err = os.WriteFile(filepath.Join(r.n.dir, "config.yaml"), credentials, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	} else {
		r.s = recordStory(t, r.n)
		if dir == "" {
			dir = filepath.Join(r.n.dir, "story")
			t.Cleanup(func() { r.keep(t) })
		}
		if out, err := r.n.shell(t, "", "mv", "-T", r.s.dir, dir); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		r.s.dir = dir
	}
	log, err := os.Open(filepath.Join(r.s.dir, logFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	fi, err := log.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if r.rec, err = powercut.ReadLog(log, fi.Size()); err != nil {
		t.Fatal(err)
	}
	for _, e := range r.rec.Events {
		if e.Kind == powercut.Flush {
			r.flushes++
		}
	}
	if r.flushes < 100 {
		t.Fatalf("%d flushes: the guest's do not reach the recorder", r.flushes)
	}
	r.judge = judge.New(judge.Options{Kernels: r.s.Kernels, Recovery: r.s.Recovery, Folder: quickFolder(t), Loader: r.loader(t)})
}

// keep saves the recording of a failed test.
func (r *rebuilding) keep(t *testing.T) {
	if !t.Failed() {
		return
	}
	dir := filepath.Join(r.n.root, "out", "test-vm", t.Name(), "story")
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Dir(dir), 0o755)); err != nil {
		t.Log(err)
		return
	}
	if out, err := exec.Command("cp", "-r", "--sparse=always", r.s.dir, dir).CombinedOutput(); err != nil {
		t.Logf("the recording is not kept: %v\n%s", err, out)
		return
	}
	t.Logf("the recording is kept: the same again with BULKHEAD_CUT_STORY=%s", dir)
}

// quickFolder returns a folder in memory, if there is room: e2fsck waits for the disk each time.
func quickFolder(t *testing.T) string {
	t.Helper()
	const shm, enough = "/dev/shm", 1 << 30
	var fs unix.Statfs_t
	if err := unix.Statfs(shm, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < enough {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(shm, "bulkhead-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// loader returns the digest of the boot loader, from the disk that nothing has run on yet.
func (r *rebuilding) loader(t *testing.T) [sha256.Size]byte {
	t.Helper()
	disk, err := os.Open(filepath.Join(r.s.dir, baseFile))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	table, _, err := gpt.Read(disk, r.s.Machine.DiskSize)
	if err != nil {
		t.Fatal(err)
	}
	esp, _ := table.ByName("ESP")
	part := powercut.Section{Device: readOnly{disk}, From: esp.Start(), Length: esp.Size()}
	v, err := fat.Open(part, part.Length)
	if err != nil {
		t.Fatal(err)
	}
	f, err := v.Open("EFI/BOOT", "BOOTX64.EFI")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size))
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

type readOnly struct{ *os.File }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, errors.New("nothing may be written") }

// replay starts one from the beginning.
func (r *rebuilding) replay(t *testing.T) *powercut.Replay {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.raw")
	if out, err := r.n.shell(t, "", "cp", "--sparse=always", filepath.Join(r.s.dir, baseFile), name); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	disk, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Close() })
	p, err := powercut.NewReplay(r.rec, disk)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// at returns the index of the mark that an event belongs to.
func (s *story) at(rec *powercut.Recording, event int) int {
	i := 0
	for i+1 < len(s.Marks) && rec.Index(s.Marks[i+1].Log) <= event {
		i++
	}
	return i
}

// may returns the mark that an interval begins in. If others follow within it, it may leave what they may leave.
func (s *story) may(rec *powercut.Recording, first, last int) mark {
	at := s.at(rec, first)
	m := s.Marks[at]
	for _, o := range s.Marks[at+1 : s.at(rec, last)+1] {
		m.Versions, m.Generations = slices.Concat(m.Versions, o.Versions), slices.Concat(m.Generations, o.Generations)
		m.Owned = m.Owned && o.Owned
	}
	return m
}

// first goes through the recording once, to learn what was whole at the marks, and whether the recording is: its end must be the disk that the
// machine has left.
func (r *rebuilding) first(t *testing.T) {
	p := r.replay(t)
	mark := 0
	for i, err := p.Next(nil); i != nil || err != nil; i, err = p.Next(i) {
		if err != nil {
			t.Fatal(err)
		}
		if now := r.s.at(r.rec, i.First); now != mark {
			mark = now
			if err := r.judge.Learn(p.Done()); err != nil {
				t.Fatalf("%s: %v", r.s.Marks[mark].Name, err)
			}
		}
	}
	if err := r.judge.Learn(p.Done()); err != nil {
		t.Fatal(err)
	}
	found, err := r.judge.Look(p.Done())
	if err != nil {
		t.Fatalf("the disk that the machine has left: %v", err)
	}
	if r.owner = found.Owner; found.Owner == "" {
		t.Fatal("the disk that the machine has left has no owner")
	}
	end, err := os.Open(filepath.Join(r.s.dir, endFile))
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	if err := p.Same(end); err != nil {
		t.Fatalf("the recording does not lead to the disk that the machine has left: %v", err)
	}
	r.notices(t, p, found)
}

// judgeAll goes through the recording, and looks at every state.
func (r *rebuilding) judgeAll(t *testing.T) {
	parts, boots := r.plan()
	only := os.Getenv("BULKHEAD_CUT_ONLY")
	p := r.replay(t)
	for i, err := p.Next(nil); i != nil || err != nil; i, err = p.Next(i) {
		if err != nil {
			t.Fatal(err)
		}
		m := r.s.may(r.rec, i.First, i.Last)
		if only != "" {
			if flush, state, _ := strings.Cut(only, "/"); flush == strconv.Itoa(i.Number) {
				number, _ := strconv.Atoi(state)
				r.reallyBoot(t, i, number, m)
				return
			}
			continue
		}
		if err := r.lookAt(t, i, 1+parts[i.Number], m); err != nil {
			t.Fatal(err)
		}
		repaired := r.repaired // as it is before something is booted
		for number := range boots[i.Number] {
			r.reallyBoot(t, i, 1+number, m)
			r.tally(m.Name).boots++
		}
		if repaired > 0 && r.boots > 0 && r.repairs <= r.boots/20 { // those are rare, and what they need runs on the node nowhere else
			r.reallyBoot(t, i, repaired, m)
			r.tally(m.Name).boots++
			r.repairs++
		}
		if r.bad > 20 {
			t.Fatal("too many are bad")
		}
	}
}

// plan says how many random states of each interval are judged, and how many are booted: of each operation as many, but for those that it has at every
// flush. What is between operations is judged, and not booted.
func (r *rebuilding) plan() (parts, boots map[int]int) {
	of := map[string][]int{}
	interval, first := 0, 0
	for n, e := range r.rec.Events {
		if e.Kind != powercut.Flush && n+1 < len(r.rec.Events) {
			continue
		}
		name := r.s.may(r.rec, first, n).Name
		r.tally(name)
		if n > first || e.Kind != powercut.Flush { // there are writes
			of[name] = append(of[name], interval)
		}
		interval, first = interval+1, n+1
	}
	parts, boots = map[int]int{}, map[int]int{}
	each := max(0, r.states-interval)/len(of) + 1
	for _, all := range of {
		for _, i := range all {
			parts[i] = each/len(all) + 1
		}
	}
	random := rand.New(rand.NewPCG(7, 7))
	for n := 0; n < r.boots; { // ends: there are operations
		for _, name := range r.order {
			if all := of[name]; len(all) > 0 && n < r.boots && !strings.HasPrefix(name, rest) {
				boots[all[random.IntN(len(all))]]++
				n++
			}
		}
	}
	return parts, boots
}

// lookAt judges so many states of an interval.
func (r *rebuilding) lookAt(t *testing.T, i *powercut.Interval, count int, m mark) error {
	r.tally(m.Name).flushes++
	r.repaired = 0
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for number := range count {
		g.Go(func() error { return r.look(t, i, number, m) })
	}
	return g.Wait()
}

// tally returns the one of an operation.
func (r *rebuilding) tally(name string) *tally {
	if r.count[name] == nil {
		r.count[name] = &tally{found: map[string]int{}}
		r.order = append(r.order, name)
	}
	return r.count[name]
}

// look judges one state. An error is the test's own, not the state's.
func (r *rebuilding) look(t *testing.T, i *powercut.Interval, number int, m mark) error {
	s, err := i.State(number)
	if err != nil {
		return err
	}
	found, err := r.judge.Look(s)
	if err == nil {
		err = r.allowed(m, found)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.tally(m.Name)
	c.states++
	c.found[fmt.Sprintf("%s/%d", found.Version, found.Generation)]++
	if found.Repaired {
		c.found["repaired"]++
		if found.Generation > 0 { // there is something to lose
			r.repaired = max(r.repaired, number)
		}
	}
	if err != nil {
		r.fail(t, s, m, err)
	}
	return nil
}

// allowed says what is wrong with what was found.
func (r *rebuilding) allowed(m mark, f judge.Found) error {
	switch {
	case !slices.Contains(m.Versions, f.Version):
		return fmt.Errorf("%s starts (%s), want one of %v", f.Version, f.Entry, m.Versions)
	case !slices.Contains(m.Generations, f.Generation):
		return fmt.Errorf("the configuration is generation %d, want one of %v", f.Generation, m.Generations)
	case f.Documents != r.s.Applied[f.Generation]:
		return fmt.Errorf("generation %d is not what was applied: %q", f.Generation, f.Documents)
	case f.Owner != "" && f.Owner != r.owner:
		return errors.New("the node has another owner")
	case m.Owned && f.Owner == "":
		return errors.New("the node has lost its owner")
	}
	return nil
}

// fail reports a bad state, and keeps the first ones. Nobody else looks meanwhile, or mu is held.
func (r *rebuilding) fail(t *testing.T, s *powercut.State, m mark, err error) {
	t.Helper()
	where := m.Where
	if where == "" {
		where = m.Name
	}
	t.Errorf("%s, state %d of flush %d: %v", where, s.Number, s.Interval, err)
	if r.bad++; r.bad > 3 { // more take room, and tell nothing
		return
	}
	dir := filepath.Join(r.n.root, "out", "test-vm", t.Name())
	file := filepath.Join(dir, fmt.Sprintf("%s-flush-%d-state-%d.raw", strings.ReplaceAll(m.Name, " ", "-"), s.Interval, s.Number))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	os.Remove(file)
	if err := s.Save(file); err != nil {
		t.Log(err)
		return
	}
	t.Logf("the disk is kept: %s", file)
}
