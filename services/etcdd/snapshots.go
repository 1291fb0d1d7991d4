package etcdd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/dbsum"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	snapshotsDir = "snapshots" // in the data folder; leaving and restoring let it be
	snapshotNew  = "new"       // in there, being made
	// reserve is what a snapshot leaves free, in bytes: etcd itself lives on the same volume, and stops where it cannot write.
	reserve = 256 << 20

	snapshotLook  = 15 * time.Second // between two looks at whether one is due
	snapshotPause = 10 * time.Minute // after a try that failed
	aloneTime     = 10 * time.Second // that a call waits for its turn
)

// schedule is how often, and how many. The zero value makes none.
type schedule struct {
	every time.Duration
	keep  int
}

// keeper makes snapshots by the schedule, each member for itself on its own volume: that needs no agreement, takes only reading from the member, and leaves each control
// plane with what it takes to begin anew, whichever of them is lost. A file gets its name when it is whole, on the disk, and has been opened and found right.
type keeper struct {
	m     *member
	dir   string
	want  func() schedule
	wake  func() // the loop, for health
	now   func() time.Time
	free  func(dir string) (uint64, error) // bytes
	look  time.Duration
	pause time.Duration
	slot  chan struct{} // one: two at the same time would only slow each other down
	gauge gauges

	mu    sync.Mutex
	err   error     // guarded by mu; of the last try
	tried time.Time // guarded by mu; when that was; by a clock that nobody sets
	made  time.Time // guarded by mu; when the last good one of this process was; the same
}

func newKeeper(m *member, cfg Config, want func() schedule, wake func()) *keeper {
	k := &keeper{m: m, dir: filepath.Join(cfg.DataDir, snapshotsDir), want: want, wake: wake, now: cfg.Now, free: freeBytes, look: snapshotLook, pause: snapshotPause, slot: make(chan struct{}, 1), gauge: newGauges(cfg.Env.Metrics)}
	if k.now == nil {
		k.now = time.Now
	}
	return k
}

// alone waits for the slot. The caller calls done.
func (k *keeper) alone(ctx context.Context) (done func(), err error) {
	timer := time.NewTimer(aloneTime)
	defer timer.Stop()
	select {
	case k.slot <- struct{}{}:
		return func() { <-k.slot }, nil
	case <-timer.C:
		return nil, errs.New(errs.Exhausted, "a snapshot is being taken or restored; one at a time is allowed")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run makes those that are due. A failure is said once, and in health; the next try comes after a pause.
func (k *keeper) run(ctx context.Context) error {
	t := time.NewTicker(k.look)
	defer t.Stop()
	for {
		k.round(ctx)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

func (k *keeper) round(ctx context.Context) {
	have, err := k.read()
	if err == nil {
		k.gauge.show(have)
	}
	if !k.due(have, k.want()) || !k.m.led() {
		return
	}
	done, err := k.alone(ctx)
	if err != nil {
		return // a client has it, for as long as that takes
	}
	s, err := k.make(ctx, next(have))
	done()
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	was := k.err
	k.err, k.tried = err, time.Now()
	if err == nil {
		k.made = k.tried
	}
	k.mu.Unlock()
	log := k.m.cfg.Env.Log
	switch {
	case err == nil:
		log.Info("snapshot made", "step", "snapshot "+s.name())
		have = append(have, s)
		if err := k.retain(have, k.want().keep); err != nil {
			log.Warn("old snapshots not deleted", "err", err.Error())
		}
	case errs.Text(was) != errs.Text(err):
		log.Warn("snapshot not made", "err", errs.Text(err))
	}
	if err != nil {
		k.gauge.failed.Add(1)
	}
	if have, err := k.read(); err == nil {
		k.gauge.show(have)
	}
	k.wake()
}

// due says whether one is to be made now. Ages are told by the clock, which may have been wrong when one was made: one from the future counts as old, but for what this process has made.
func (k *keeper) due(have []saved, want schedule) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if want.every == 0 || k.err != nil && time.Since(k.tried) < k.pause {
		return false
	}
	if len(have) == 0 {
		return true
	}
	age := k.now().Sub(have[len(have)-1].made)
	return age >= want.every || age < 0 && (k.made.IsZero() || time.Since(k.made) >= want.every)
}

// trouble is what health says: tries fail, and the last good one is older than two of the schedule.
func (k *keeper) trouble() string {
	want := k.want()
	k.mu.Lock()
	err := k.err
	k.mu.Unlock()
	if want.every == 0 || err == nil {
		return ""
	}
	have, rerr := k.read()
	switch {
	case rerr != nil:
		return errs.Text(rerr)
	case len(have) == 0:
		return "there is none: " + errs.Text(err)
	}
	last := have[len(have)-1]
	if k.now().Sub(last.made) < 2*want.every {
		return ""
	}
	return fmt.Sprintf("the last good one was made at %s: %s", last.made.Format(time.RFC3339), errs.Text(err))
}

// led reports whether the member runs, has a vote, and a leader: it is where others are.
func (m *member) led() bool {
	e, _ := m.running()
	return e != nil && !isLearner(e) && e.Server.Leader() != 0
}

// make saves the database under a number, and returns when it is on the disk and found right.
func (k *keeper) make(ctx context.Context, number int) (s saved, err error) {
	ctx, cancel := context.WithTimeout(ctx, snapshotTime)
	defer cancel()
	_, client := k.m.running()
	if client == nil {
		return s, errs.New(errs.Unavailable, "the etcd member does not run")
	}
	st, err := client.Status(ctx, client.Endpoints()[0])
	if err != nil {
		return s, memberError("status", err)
	}
	if err := os.Mkdir(k.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return s, err
	}
	free, err := k.free(k.dir)
	if err != nil {
		return s, err
	}
	if need := uint64(st.DbSize) + reserve; free < need {
		return s, errs.New(errs.Exhausted, "volume VAR has %d MiB free, and a snapshot needs %d: %d for the database, and %d that stay free; make room, or keep fewer (Cluster.etcd.snapshots.keep)",
			free>>20, need>>20, st.DbSize>>20, reserve>>20)
	}
	path := filepath.Join(k.dir, snapshotNew)
	defer func() {
		if err != nil {
			err = errors.Join(err, rest(os.Remove(path)))
		}
	}()
	now := k.now()
	db, err := client.Snapshot(ctx)
	if err != nil {
		return s, memberError("snapshot", err)
	}
	if err := errors.Join(receiveWhole(path, db), db.Close()); err != nil {
		return s, err
	}
	s = saved{number: number, made: now.UTC().Truncate(time.Second)}
	if s.revision, s.bytes, err = verify(ctx, path); err != nil {
		return s, err
	}
	if err := os.Rename(path, filepath.Join(k.dir, s.name())); err != nil {
		return s, err
	}
	return s, syncDir(k.dir)
}

// receiveWhole returns when what was read is on the disk, and was whole.
func receiveWhole(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	var sum dbsum.Sum
	_, err = io.Copy(io.MultiWriter(&sum, f), r)
	if err == nil && !sum.Whole() {
		err = fmt.Errorf("the member sent %d bytes that are no whole snapshot", sum.Bytes())
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// rest is what is wrong besides that there is nothing.
func rest(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// retain deletes all but the newest. The last of have was found good a moment ago, and always stays.
func (k *keeper) retain(have []saved, keep int) error {
	var err error
	for _, s := range have[:max(0, len(have)-max(keep, 1))] {
		err = errors.Join(err, rest(os.Remove(filepath.Join(k.dir, s.name()))))
	}
	return err
}

// read lists what is there, the oldest first.
func (k *keeper) read() ([]saved, error) {
	entries, err := os.ReadDir(k.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []saved
	for _, e := range entries {
		s, ok := parseName(e.Name())
		if fi, err := e.Info(); ok && err == nil && fi.Mode().IsRegular() {
			s.bytes = fi.Size()
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b saved) int { return a.number - b.number })
	return out, nil
}

func (k *keeper) list() (*etcdv1.ListSnapshotsResponse, error) {
	have, err := k.read()
	if err != nil {
		return nil, err
	}
	want := k.want()
	out := &etcdv1.ListSnapshotsResponse{EverySeconds: uint64(want.every / time.Second), Keep: uint32(want.keep)}
	k.mu.Lock()
	out.Error = errs.Text(k.err)
	k.mu.Unlock()
	for _, s := range have {
		out.Snapshots = append(out.Snapshots, &etcdv1.Snapshot{Name: s.name(), Made: timestamppb.New(s.made), Bytes: uint64(s.bytes), Revision: uint64(s.revision)})
	}
	return out, nil
}

// find returns the path of a snapshot by its name.
func (k *keeper) find(name string) (string, error) {
	have, err := k.read()
	if err != nil {
		return "", err
	}
	var names []string
	for _, s := range have {
		if s.name() == name {
			return filepath.Join(k.dir, name), nil
		}
		names = append(names, s.name())
	}
	if len(names) == 0 {
		return "", errs.New(errs.NotFound, "this node has no snapshot %.64q, and none at all yet", name)
	}
	return "", errs.New(errs.NotFound, "this node has no snapshot %.64q; it has %s", name, strings.Join(names, ", "))
}

// open returns one for reading. It is read to its end also if it is deleted meanwhile.
func (k *keeper) open(name string) (*os.File, error) {
	path, err := k.find(name)
	if err != nil {
		return nil, err
	}
	return os.Open(path)
}

// link gives one a second name, under which a restore uses it up, after it was read once more. It takes no room.
func (k *keeper) link(ctx context.Context, name, to string) (int64, error) {
	path, err := k.find(name)
	if err != nil {
		return 0, err
	}
	if _, _, err := verify(ctx, path); err != nil {
		return 0, errs.New(errs.Invalid, "restore: %w; nothing was changed", err)
	}
	if err := rest(os.Remove(to)); err != nil {
		return 0, err
	}
	fi, err := os.Stat(path)
	if err == nil {
		err = os.Link(path, to)
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}
