package etcdd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/bulkhead-os/bulkhead/internal/dbsum"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// saved is a snapshot that the schedule made. Its name says all but its size. Numbers count up on each node: neither a clock nor revisions, which begin anew with
// another cluster, say for sure which is the newest.
type saved struct {
	number   int
	made     time.Time // UTC, whole seconds
	revision int64     // the last one in it
	bytes    int64
}

const savedTime = "20060102T150405Z"

func (s saved) name() string {
	return fmt.Sprintf("%06d-%s-%d.db", s.number, s.made.Format(savedTime), s.revision)
}

var savedName = regexp.MustCompile(`^([0-9]{6,9})-([0-9]{8}T[0-9]{6}Z)-([0-9]{1,18})\.db$`)

// parseName is the inverse of name; it tells snapshots from all else that is there.
func parseName(name string) (saved, bool) {
	p := savedName.FindStringSubmatch(name)
	if p == nil {
		return saved{}, false
	}
	number, err := strconv.Atoi(p[1])
	made, terr := time.Parse(savedTime, p[2])
	revision, rerr := strconv.ParseInt(p[3], 10, 64)
	s := saved{number: number, made: made, revision: revision}
	return s, errors.Join(err, terr, rerr) == nil && s.name() == name
}

// next is the number of the next one.
func next(have []saved) int {
	if len(have) == 0 {
		return 1
	}
	return have[len(have)-1].number + 1
}

// verify reads a snapshot from its first to its last byte: its sum is right, it opens as a database, all its pages hang together, and it has etcd's keys. It returns the last
// revision in it, and its size. What upstream's own look does besides, it counts all keys in memory, is more than this process may have.
// A look that is cancelled ends soon, but not at once: a stop of the member waits for it.
func verify(ctx context.Context, path string) (revision, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	var sum dbsum.Sum
	_, err = io.Copy(&sum, until{ctx, f})
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, 0, err
	}
	name := filepath.Base(path)
	if !sum.Whole() {
		return 0, 0, fmt.Errorf("snapshot %s: %d bytes that are not what was written: the SHA-256 at its end is wrong", name, sum.Bytes())
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return 0, 0, fmt.Errorf("snapshot %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.View(func(tx *bolt.Tx) error {
		var first error
		for e := range tx.Check() { // to its end: it is another goroutine's
			if first == nil {
				first = e
			}
		}
		if first != nil {
			return first
		}
		keys := tx.Bucket([]byte("key"))
		if keys == nil {
			return errors.New("it has no bucket of keys")
		}
		last, _ := keys.Cursor().Last()
		if len(last) >= 8 { // main revision, big-endian, then '_' and more
			revision = int64(binary.BigEndian.Uint64(last))
		}
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("snapshot %s: %w", name, err)
	}
	return revision, sum.Bytes(), nil
}

// until is a reader that ends with a context.
type until struct {
	ctx context.Context
	r   io.Reader
}

func (u until) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// gauges are the figures of the schedule.
type gauges struct{ count, bytes, last, failed *metrics.Vec }

func newGauges(m *metrics.Set) gauges {
	return gauges{
		count:  m.Gauge("bulkhead_etcdd_snapshots", "Snapshots that the schedule has made and that are kept."),
		bytes:  m.Gauge("bulkhead_etcdd_snapshots_bytes", "Room that they take."),
		last:   m.Gauge("bulkhead_etcdd_snapshot_last_good_timestamp_seconds", "When the newest of them was made, since 1970; 0 if there is none. Its age is time() minus this."),
		failed: m.Counter("bulkhead_etcdd_snapshot_failures_total", "Tries to make one that failed."),
	}
}

func (g gauges) show(have []saved) {
	var bytes, last float64
	for _, s := range have {
		bytes, last = bytes+float64(s.bytes), float64(s.made.Unix())
	}
	g.count.Set(float64(len(have)))
	g.bytes.Set(bytes)
	g.last.Set(last)
	g.failed.Add(0) // so that it is there before it counts
}
