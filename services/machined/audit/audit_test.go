package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/auditchain"
)

func open(t testing.TB, l *Log, dir string) {
	t.Helper()
	folder, err := os.OpenRoot(dir)
	if err == nil {
		err = l.Open(folder)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// reopened returns the log as the next process finds it.
func reopened(t *testing.T, l *Log, dir string) *Log {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again := newLog("boot-b", l.most)
	open(t, again, dir)
	t.Cleanup(func() { again.Close() })
	return again
}

func call(n int) string { return fmt.Sprintf(`{"level":"INFO","msg":"audit","who":"ann","n":%d}`, n) }

// records reads the log and checks it.
func records(t testing.TB, l *Log, anchors ...auditchain.Anchor) (all []*auditchain.Record, r auditchain.Report) {
	t.Helper()
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	v := auditchain.Verifier{Anchors: anchors}
	err := l.Stream(t.Context(), false, func(line []byte) error {
		v.Add(line)
		if r, err := auditchain.Parse(bytes.Clone(line)); err == nil {
			all = append(all, r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, v.Report(true)
}

func kinds(all []*auditchain.Record) string {
	var out []string
	for _, r := range all {
		out = append(out, string(r.Kind))
	}
	return strings.Join(out, " ")
}

func TestSurvivesRestartsAndPowerCuts(t *testing.T) {
	dir := t.TempDir()
	l := newLog("boot-a", SegmentSize)
	l.Add(time.Now(), call(1)) // STATE is not open yet
	l.Add(time.Now(), `{"msg":"certificate signed"}`)
	if err := l.Stream(t.Context(), false, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("read before STATE is open: %v", err)
	}
	open(t, l, dir)
	l.Add(time.Now(), call(2))
	l.Add(time.Now(), `{"msg":"audit","who":"ann…`) // it was cut
	if all, r := records(t, l); kinds(all) != "start call call call" || r.Problems != nil || string(all[1].Entry) != call(1) || all[3].Note == "" {
		t.Fatalf("%s: %+v", kinds(all), r)
	}
	before := l.Head()
	l = reopened(t, l, dir)
	l.Add(time.Now(), call(3))
	all, r := records(t, l, auditchain.Anchor{Head: before})
	if kinds(all) != "start call call call start call" || r.Problems != nil || all[4].Boot != "boot-b" || r.Anchored.Head != before {
		t.Fatalf("after a restart: %s: %+v", kinds(all), r)
	}
	// The power was cut in the middle of a record, which was on no disk and so in no anchor.
	before = l.Head()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, newer), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(`{"chain":"x","seq":7,"ki` + strings.Repeat("\x00", 600))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	l = newLog("boot-c", SegmentSize)
	open(t, l, dir)
	defer l.Close()
	all, r = records(t, l, auditchain.Anchor{Head: before})
	if !strings.HasSuffix(kinds(all), "call torn start") || r.Problems != nil || !strings.Contains(all[len(all)-2].Note, "624 bytes at the end") {
		t.Errorf("after a power cut: %s: %+v", kinds(all), r)
	}
}

// What was changed while nobody looked stays for whoever checks the log, and the log goes on.
func TestDamageStays(t *testing.T) {
	dir := t.TempDir()
	l := newLog("a", SegmentSize)
	open(t, l, dir)
	for i := range 5 {
		l.Add(time.Now(), call(i))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, newer)
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, bytes.Replace(data, []byte(`"n":2`), []byte(`"n":9`), 1), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	l = newLog("b", SegmentSize)
	open(t, l, dir)
	defer l.Close()
	l.Add(time.Now(), call(6))
	_, r := records(t, l)
	if len(r.Problems) != 1 || r.Problems[0].Fault != auditchain.Changed || r.Problems[0].Sequence != 4 || r.Last != 8 {
		t.Errorf("%+v", r)
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := newLog("a", 4<<10)
	open(t, l, dir)
	var anchors []auditchain.Anchor
	for i := range 120 {
		l.Add(time.Now(), call(i))
		if i%20 == 0 {
			if err := l.Sync(); err != nil {
				t.Fatal(err)
			}
			anchors = append(anchors, auditchain.Anchor{Head: l.Head(), At: time.Unix(int64(i), 0)})
		}
		if i == 60 {
			l = reopened(t, l, dir)
		}
	}
	all, r := records(t, l, anchors...)
	if r.Problems != nil || r.First < 2 || r.Kept < r.First || r.Last < 120 || r.Anchored != anchors[len(anchors)-1] || !strings.Contains(kinds(all), "rotated") {
		t.Fatalf("%+v", r)
	}
	for _, name := range []string{older, newer} {
		if i, err := os.Stat(filepath.Join(dir, name)); err != nil || i.Size() > 4<<10+1<<10 {
			t.Errorf("%s: %v, %v: larger than its bound and one record", name, i, err)
		}
	}
	// More than the node deleted is missing.
	if err := os.Remove(filepath.Join(dir, older)); err != nil {
		t.Fatal(err)
	}
	if _, r := records(t, reopened(t, l, dir)); len(r.Problems) != 1 || r.Problems[0].Fault != auditchain.Removed {
		t.Errorf("the older file was deleted: %+v", r)
	}
}

func TestOneOrder(t *testing.T) {
	l := newLog("a", 64<<10)
	open(t, l, t.TempDir())
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx, func(err error) { t.Error(err) }) }()
	seen := make(chan *auditchain.Record, 1000)
	followed := make(chan error, 1)
	go func() {
		followed <- l.Stream(ctx, true, func(line []byte) error {
			r, err := auditchain.Parse(bytes.Clone(line))
			seen <- r
			return err
		})
	}()
	const writers, each = 8, 50
	var wait sync.WaitGroup
	for w := range writers {
		wait.Go(func() {
			for i := range each {
				l.Add(time.Now(), call(w*1000+i))
			}
		})
	}
	wait.Wait()
	// Who follows gets every record once, in the order of the file, and each writer's in the writer's.
	last := map[int]int{}
	for n := uint64(1); n <= writers*each+1; n++ {
		r := <-seen
		if r.Sequence != n {
			t.Fatalf("record %d, want %d", r.Sequence, n)
		}
		var w int
		if _, err := fmt.Sscanf(strings.TrimPrefix(string(r.Entry), `{"level":"INFO","msg":"audit","who":"ann","n":`), "%d", &w); err != nil {
			continue // the first record
		}
		if at, ok := last[w/1000]; ok && w%1000 != at+1 {
			t.Fatalf("writer %d: %d after %d", w/1000, w%1000, at)
		}
		last[w/1000] = w % 1000
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := <-followed; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, r := records(t, l); r.Problems != nil {
		t.Errorf("%+v", r)
	}
}

// A log that cannot be written holds calls up to a bound, and says how many it could not keep.
func TestSaysWhatIsLost(t *testing.T) {
	l := newLog("a", SegmentSize)
	for i := range maxHeld + 3 {
		l.Add(time.Now(), call(i))
	}
	open(t, l, t.TempDir())
	defer l.Close()
	l.Add(time.Now(), call(0))
	all, r := records(t, l)
	if r.Problems != nil || l.Dropped() != 3 || !strings.HasSuffix(kinds(all), "call call lost") || !strings.Contains(all[len(all)-1].Note, "3 calls") {
		t.Errorf("dropped %d: %+v, ends with %+v", l.Dropped(), r, all[len(all)-1])
	}
}

// A disk that takes nothing for a while costs no record: they are written when it does again, in their order.
func TestWritesAgain(t *testing.T) {
	dir := t.TempDir()
	l := newLog("a", SegmentSize)
	open(t, l, dir)
	defer l.Close()
	good := l.file[1]
	broken, err := os.Open(filepath.Join(dir, newer)) // it cannot be written
	if err != nil {
		t.Fatal(err)
	}
	defer broken.Close()
	l.file[1] = broken
	for i := range 3 {
		l.Add(time.Now(), call(i))
	}
	if err := l.Sync(); err == nil {
		t.Fatal("no error")
	}
	before := l.Head()
	l.file[1] = good
	l.Add(time.Now(), call(3))
	all, r := records(t, l)
	if kinds(all) != "start call call call call" || r.Problems != nil || before.Sequence != 1 || string(all[4].Entry) != call(3) {
		t.Errorf("%s, %+v", kinds(all), r)
	}
}

// BenchmarkAdd is what an audited call costs until its record is with the kernel, and how many bytes it has.
func BenchmarkAdd(b *testing.B) {
	l := newLog("a", SegmentSize)
	open(b, l, b.TempDir())
	defer l.Close()
	line := `{"level":"INFO","msg":"audit","daemon":"apid","who":"ann","roles":"admin","method":"/config.v1.Config/Apply","peer":"192.0.2.1:40312","node":"n1","code":"OK","dur":"1.2ms","change":true}`
	for b.Loop() {
		l.Add(time.Now(), line)
		if err := l.write(); err != nil {
			b.Fatal(err)
		}
	}
}
