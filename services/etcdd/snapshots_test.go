package etcdd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// snapshots waits until the list is as wanted.
func (n *node) snapshots(t *testing.T, what string, ok func(*etcdv1.ListSnapshotsResponse) bool) *etcdv1.ListSnapshotsResponse {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; {
		l, err := n.etcd.ListSnapshots(t.Context(), &etcdv1.ListSnapshotsRequest{})
		if err == nil && ok(l) {
			return l
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v, %v", what, l, err)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// names are those of a list; count is how many a wait is for.
func names(l *etcdv1.ListSnapshotsResponse) (out []string) {
	for _, s := range l.GetSnapshots() {
		out = append(out, s.GetName())
	}
	return out
}

func endsWith(count int, number string) func(*etcdv1.ListSnapshotsResponse) bool {
	return func(l *etcdv1.ListSnapshotsResponse) bool {
		all := names(l)
		return len(all) == count && strings.HasPrefix(all[count-1], number)
	}
}

// fetch reads a snapshot by its name, "" for one of now.
func fetch(ctx context.Context, n *node, name string) ([]byte, error) {
	s, err := n.etcd.StreamSnapshot(ctx, &etcdv1.StreamSnapshotRequest{Name: name})
	if err != nil {
		return nil, err
	}
	var all []byte
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, m.GetData()...)
	}
}

// snapshotTrouble is what health gets.
func snapshotTrouble(s *controlv1.State) string {
	for _, c := range s.GetConditions() {
		if c.GetName() == "snapshots" {
			return c.GetTrouble()
		}
	}
	return "no such condition"
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	var skew atomic.Int64
	n.clock = func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	later := func(d time.Duration) { skew.Add(int64(d)) }
	n.every = 1
	n.volume(t)
	dir := filepath.Join(n.dir, "data", snapshotsDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, junk := range []string{snapshotNew, "notes", "000001-20260101T000000Z-7.db.bak"} {
		if err := os.WriteFile(filepath.Join(dir, junk), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.start(t)
	n.until(t, converged)
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	first := n.snapshots(t, "the first one comes by itself", endsWith(1, "000001-"))
	if first.GetEverySeconds() != 3600 || first.GetKeep() != 2 || first.GetError() != "" {
		t.Errorf("schedule: %v", first)
	}
	w, err := n.store(t).Write(ctx, put("before", "1", 0))
	if err != nil {
		t.Fatal(err)
	}
	later(time.Hour)
	l := n.snapshots(t, "an hour later", endsWith(2, "000002-"))
	if second := l.GetSnapshots()[1]; second.GetRevision() != w.GetRevision() || second.GetMade().AsTime().Sub(l.GetSnapshots()[0].GetMade().AsTime()) < time.Hour {
		t.Errorf("the second: %v, want revision %d and an hour between", l, w.GetRevision())
	}
	later(time.Hour)
	l = n.snapshots(t, "the third, and the first is gone", endsWith(2, "000003-"))
	good := l.GetSnapshots()[1]
	data, err := fetch(ctx, n, good.GetName())
	if file, ferr := os.ReadFile(filepath.Join(dir, good.GetName())); err != nil || ferr != nil || !bytes.Equal(file, data) || uint64(len(data)) != good.GetBytes() {
		t.Errorf("fetched %d bytes, %v, %v; want those of the file, %d", len(data), err, ferr, good.GetBytes())
	}
	for _, name := range []string{"none", "../member/snap/db", "notes", names(first)[0]} {
		if _, err := fetch(ctx, n, name); !errs.Is(err, errs.NotFound) || !strings.Contains(errs.Text(err), good.GetName()) {
			t.Errorf("fetch %q: %v, want that there is none, and which there are", name, err)
		}
	}
	fullVolume(ctx, t, n, later, names(l))
	restoreByName(ctx, t, n, w.GetRevision())
}

// fullVolume: without room none is made, nothing half is left, the last good ones stay, and health says so when they get old.
func fullVolume(ctx context.Context, t *testing.T, n *node, later func(time.Duration), have []string) {
	n.full.Store(true)
	later(90 * time.Minute)
	l := n.snapshots(t, "an error", func(l *etcdv1.ListSnapshotsResponse) bool { return l.GetError() != "" })
	if !strings.Contains(l.GetError(), "volume VAR has 7 MiB free") || !slices.Equal(names(l), have) {
		t.Errorf("on a full volume: %v, want %v to stay", l, have)
	}
	n.until(t, func(s *controlv1.State) bool { return s.GetConverged() && snapshotTrouble(s) == "" })
	later(time.Hour)
	n.until(t, func(s *controlv1.State) bool {
		trouble := snapshotTrouble(s)
		return strings.Contains(trouble, "the last good one was made at") && strings.Contains(trouble, "7 MiB free")
	})
	left, err := filepath.Glob(filepath.Join(n.dir, "data", snapshotsDir, "*"))
	if err != nil || len(left) != len(have)+2 { // two of what was there before, and is none
		t.Errorf("left in the folder: %v, %v", left, err)
	}
	n.full.Store(false)
	n.snapshots(t, "room again", endsWith(2, "000004-"))
	figure := func(name string) float64 {
		m, err := n.control.ReadMetrics(ctx, &controlv1.ReadMetricsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range m.GetFamilies() {
			if f.GetName() == name && len(f.GetSamples()) == 1 {
				return f.GetSamples()[0].GetValue()
			}
		}
		t.Fatalf("no metric %s", name)
		return 0
	}
	for end := time.Now().Add(30 * time.Second); ; <-time.After(10 * time.Millisecond) { // they follow the files
		count, failed, age := figure("bulkhead_etcdd_snapshots"), figure("bulkhead_etcdd_snapshot_failures_total"), n.clock().Sub(time.Unix(int64(figure("bulkhead_etcdd_snapshot_last_good_timestamp_seconds")), 0))
		if count == 2 && failed >= 1 && age <= time.Minute {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("metrics: %g snapshots, %g failures, the last one %s ago", count, failed, age)
		}
	}
	n.until(t, func(s *controlv1.State) bool { return snapshotTrouble(s) == "" })
}

func restoreByName(ctx context.Context, t *testing.T, n *node, seen uint64) {
	l := n.snapshots(t, "some", endsWith(2, "000004-"))
	if _, err := n.store(t).Write(ctx, put("after", "1", 0)); err != nil {
		t.Fatal(err)
	}
	order := func(r ...*etcdv1.RestoreRequest) error {
		s, err := n.etcd.Restore(ctx)
		for _, m := range r {
			if err == nil {
				_ = s.Send(m) // the answer says why not
			}
		}
		if err == nil {
			_, err = s.CloseAndRecv()
		}
		return err
	}
	name, damaged := names(l)[1], names(l)[0]
	path := filepath.Join(n.dir, "data", snapshotsDir, damaged)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, r := range map[string][]*etcdv1.RestoreRequest{
		"by force":             {{Name: name}},
		"no snapshot":          {{Name: "000000-none", Force: true}},
		"both a name and data": {{Name: name, Force: true, Data: []byte("x")}},
		"more comes after":     {{Name: name, Force: true}, {Data: []byte("x")}},
		"the SHA-256 at its":   {{Name: damaged, Force: true}},
	} {
		if err := order(r...); err == nil || !strings.Contains(errs.Text(err), want) {
			t.Errorf("restore %v: %v, want %q", r, err, want)
		}
	}
	if st := n.status(t); st.GetState() != "running" {
		t.Fatalf("after refusals: %v", st)
	}
	if err := order(&etcdv1.RestoreRequest{Name: name, Force: true}); err != nil {
		t.Fatal(err)
	}
	n.until(t, func(*controlv1.State) bool {
		r, err := n.store(t).Read(ctx, &storev1.ReadRequest{Prefix: own})
		return err == nil && len(r.GetEntries()) == 1 && r.GetEntries()[0].GetKey() == own+"before" && r.GetRevision() >= seen+revisionBump
	})
	n.snapshots(t, "what was restored from is there still", func(l *etcdv1.ListSnapshotsResponse) bool { return slices.Contains(names(l), name) })
}

// TestDue: clocks go wrong; snapshots are made all the same, and not one after the other.
func TestDue(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	every := schedule{every: 6 * time.Hour, keep: 3}
	at := func(d time.Duration) []saved { return []saved{{number: 1, made: now.Add(d)}} }
	for _, c := range []struct {
		name        string
		have        []saved
		want        schedule
		made, tried time.Duration // ago, by the other clock; 0: never
		err         error
		due         bool
	}{
		{"none yet", nil, every, 0, 0, nil, true},
		{"not wanted", nil, schedule{}, 0, 0, nil, false},
		{"young", at(-5 * time.Hour), every, 0, 0, nil, false},
		{"old", at(-6 * time.Hour), every, 0, 0, nil, true},
		{"the newest counts", []saved{{number: 1, made: now.Add(-90 * time.Hour)}, {number: 2, made: now.Add(-time.Hour)}}, every, 0, 0, nil, false},
		{"from the future, of another process", at(87600 * time.Hour), every, 0, 0, nil, true},
		{"from the future, and just made", at(time.Hour), every, time.Minute, time.Minute, nil, false},
		{"from the future, and made long ago", at(time.Hour), every, 7 * time.Hour, 7 * time.Hour, nil, true},
		{"just failed", at(-9 * time.Hour), every, 0, time.Minute, errors.New("full"), false},
		{"failed a while ago", at(-9 * time.Hour), every, 0, time.Hour, errors.New("full"), true},
	} {
		k := &keeper{now: func() time.Time { return now }, pause: snapshotPause, err: c.err}
		if c.made > 0 {
			k.made = time.Now().Add(-c.made)
		}
		if c.tried > 0 {
			k.tried = time.Now().Add(-c.tried)
		}
		if got := k.due(c.have, c.want); got != c.due {
			t.Errorf("%s: due is %v", c.name, got)
		}
	}
}

func TestSavedNames(t *testing.T) {
	s := saved{number: 12, made: time.Date(2026, 11, 26, 16, 4, 5, 0, time.UTC), revision: 4711}
	if got, ok := parseName(s.name()); !ok || got != s {
		t.Errorf("%s is read as %+v, %v", s.name(), got, ok)
	}
	for _, name := range []string{"", "new", "000012-20261126T160405Z-4711", "12-20261126T160405Z-4711.db", "000012-20261326T160405Z-4711.db", "0000012-20261126T160405Z-4711.db", "000012-20261126T160405Z-04711.db", "../000012-20261126T160405Z-4711.db"} {
		if _, ok := parseName(name); ok {
			t.Errorf("%q is taken for a snapshot", name)
		}
	}
}

// TestRetain: the newest stay, and one always does.
func TestRetain(t *testing.T) {
	for keep, want := range map[int]int{0: 1, 1: 1, 3: 3, 9: 5} {
		k := &keeper{dir: t.TempDir(), gauge: newGauges(metrics.New("x"))}
		for i := range 5 {
			s := saved{number: i + 1, made: time.Unix(int64(100-i), 0).UTC(), revision: int64(100 - i)}
			if err := os.WriteFile(filepath.Join(k.dir, s.name()), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		have, err := k.read()
		if err == nil {
			err = k.retain(have, keep)
		}
		if err != nil {
			t.Fatal(err)
		}
		if left, err := k.read(); err != nil || len(left) != want || left[len(left)-1].number != 5 {
			t.Errorf("keep %d leaves %v, %v; want %d, the newest", keep, left, err, want)
		}
	}
}

// TestNoHalfFile: a disk that gets full on the way, a member that sends only a part, a page that is none: each is an error, and never a snapshot.
func TestNoHalfFile(t *testing.T) {
	dir := t.TempDir()
	body := bytes.Repeat([]byte("page"), 4096)
	sum := sha256.Sum256(body)
	whole := append(slices.Clone(body), sum[:]...)
	full := filepath.Join(dir, "full")
	if err := os.Symlink("/dev/full", full); err != nil {
		t.Fatal(err)
	}
	if err := receiveWhole(full, bytes.NewReader(whole)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	path := filepath.Join(dir, snapshotNew)
	if err := receiveWhole(path, bytes.NewReader(whole[:len(whole)-512])); err == nil || !strings.Contains(err.Error(), "no whole snapshot") {
		t.Errorf("a part: %v", err)
	}
	if err := receiveWhole(path, bytes.NewReader(whole)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := verify(t.Context(), path); err == nil || !strings.Contains(err.Error(), "snapshot new: ") {
		t.Errorf("whole, and no database: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := verify(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("a look that was called off: %v", err)
	}
}
