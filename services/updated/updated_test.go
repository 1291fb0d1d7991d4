package updated

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// answerPieces is a client that has the bundle.
func (b *bench) answerPieces(head bundle.Head, data []byte, edit func(*updatev1.UploadRequest)) (last *updatev1.UpgradeProgress, sent int64, err error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	stream, err := b.update.Upload(ctx)
	must(b.t, err)
	if err := stream.Send(&updatev1.UploadRequest{Manifest: head.Raw, Signature: head.Signature}); err != nil && !errors.Is(err, io.EOF) { // io.EOF: refused already; why is what receive gets
		b.t.Fatal(err)
	}
	err = receive(stream.Recv, func(m *updatev1.UploadResponse) {
		if m.GetProgress() != nil {
			last = m.GetProgress()
		}
		w := m.GetWant()
		if w == nil {
			return
		}
		for i, f := range head.Manifest.Files {
			if f.Name != w.GetFile() {
				continue
			}
			rest := data[head.Offsets()[i]+int64(w.GetOffset()):][:w.GetLength()]
			for len(rest) > 0 {
				n := min(len(rest), 100_000)
				r := &updatev1.UploadRequest{Data: bytes.Clone(rest[:n])}
				if edit != nil {
					edit(r)
				}
				sent += int64(n)
				if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
					b.t.Error(err)
				}
				rest = rest[n:]
			}
		}
	})
	return last, sent, err
}

func TestUpload(t *testing.T) {
	head, data := testImage(t, "0.2.0", 3<<20)
	b := newBench(t)
	b.start()
	last, sent, err := b.answerPieces(head, data, nil)
	if err != nil || last.GetStep() != "done" || sent != head.Manifest.Size() {
		t.Fatalf("got %v, %d of %d bytes, %v", last, sent, head.Manifest.Size(), err)
	}
	if _, sent, err := b.answerPieces(head, data, nil); err != nil || sent != 0 {
		t.Errorf("again: %d bytes, %v", sent, err)
	}
	b = newBench(t)
	b.start()
	if _, _, err := b.answerPieces(head, data, func(r *updatev1.UploadRequest) { r.Data[0] ^= 1 }); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "changed after it was signed") {
		t.Errorf("wrong data: %v", err)
	}
	if _, _, err := b.answerPieces(head, data, func(r *updatev1.UploadRequest) { r.Data = append(r.Data, make([]byte, 4<<20-200_000)...) }); !errs.Is(err, errs.Invalid) {
		t.Errorf("too much data: %v", err)
	}
	foreign := head
	foreign.Signature = bytes.Repeat([]byte{1}, 64)
	if _, sent, err := b.answerPieces(foreign, data, nil); !errs.Is(err, errs.Invalid) || sent != 0 {
		t.Errorf("wrong signature: %d bytes, %v", sent, err)
	}
}

// storaged dies in the middle of it: the upgrade begins again, and what was written is not sent again.
func TestStoragedRestarts(t *testing.T) {
	head, data := testImage(t, "0.2.0", 6<<20)
	b := newBench(t)
	b.storage.forget = 3
	b.start()
	last, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: serveHTTP(t, content(data)).URL}})
	if err != nil || last.GetVersion() != "0.2.0" || last.GetFetchBytes() >= uint64(head.Manifest.Size()) {
		t.Errorf("got %v, %v", last, err)
	}
}

// One at a time; and when the caller leaves, it ends.
func TestOneUpgrade(t *testing.T) {
	head, _ := testImage(t, "0.2.0", 1<<20)
	b := newBench(t)
	b.start()
	ctx, leave := context.WithCancel(t.Context())
	stream, err := b.update.Upload(ctx)
	must(t, err)
	must(t, stream.Send(&updatev1.UploadRequest{Manifest: head.Raw, Signature: head.Signature}))
	for {
		m, err := stream.Recv()
		must(t, err)
		if m.GetWant() != nil {
			break
		}
	}
	if _, _, err := b.answerPieces(head, nil, nil); !errs.Is(err, errs.Conflict) {
		t.Errorf("a second one: %v", err)
	}
	if _, err := b.update.Rollback(t.Context(), &updatev1.RollbackRequest{}); !errs.Is(err, errs.Conflict) {
		t.Errorf("a rollback meanwhile: %v", err)
	}
	b.until("the upgrade to show", func(s *updatev1.Status) bool { return s.GetUpgrade().GetVersion() == "0.2.0" })
	leave()
	b.until("the upgrade to end", func(s *updatev1.Status) bool { return s.GetUpgrade() == nil })
	if _, err := b.update.Rollback(t.Context(), &updatev1.RollbackRequest{}); errs.Is(err, errs.Conflict) {
		t.Errorf("afterwards: %v", err)
	}
}

// onTrial puts the node on trial.
func (b *bench) onTrial() {
	b.storage.slots = slots("0.2.0", [2]string{"good", "on trial"}, "0.1.0", "0.2.0")
	b.storage.slots.Slots[1].TriesLeft, b.storage.slots.Slots[1].TriesDone = 2, 1
}

func (b *bench) spec(doc string) {
	b.t.Helper()
	set, err := parse([]byte(doc))
	must(b.t, err)
	must(b.t, b.d.loop.Set(1, set))
}

const specText = "apiVersion: bulkhead.dev/v1\nkind: Update\npatience: 3\n"

// A version is found good when all is proved, and not before.
func TestFoundGood(t *testing.T) {
	b := newBench(t)
	b.onTrial()
	b.machine.checks = healthy("!api.answered: no call")
	b.start()
	b.spec(specText)
	st := b.until("what is missing", func(s *updatev1.Status) bool { return len(s.GetProofs()) == 5 && s.GetProofs()[1].GetOk() })
	if p := st.GetProofs()[0]; p.GetName() != "api" || p.GetOk() || p.GetDetail() != "api.answered: no call" {
		t.Errorf("proofs: %v", st.GetProofs())
	}
	if v := st.GetSlots()[1]; v.GetStatus() != "on trial" || v.GetDetail() != "try 1; missing: api: api.answered: no call" || st.GetDeadline() == nil {
		t.Errorf("slot: %v", v)
	}
	b.until("a sign of life", func(s *updatev1.Status) bool { return b.d.book.get().Trial != nil })
	if _, err := os.Stat(b.folder + "/good"); err == nil {
		t.Error("PID 1 was told that a version on trial is good")
	}
	if _, err := os.Stat(b.folder + "/judged"); err != nil {
		t.Errorf("PID 1 was not told that the version is judged: %v", err)
	}
	if tr := b.d.book.get().Trial; tr.Missing != "api: api.answered: no call" || len(tr.Lines) != 2 || tr.Lines[1] != "the last of 120 lines" || tr.Try != 1 {
		t.Errorf("the trial's record: %+v", tr)
	}
	b.machine.mu.Lock()
	b.machine.checks = healthy()
	b.machine.mu.Unlock()
	st = b.until("good", func(s *updatev1.Status) bool { return s.GetConverged() && s.GetSlots()[1].GetStatus() == "good" })
	if !strings.HasPrefix(st.GetSlots()[1].GetDetail(), "found good by health at ") || len(st.GetProofs()) != 0 || st.GetDeadline() != nil {
		t.Errorf("afterwards: %v", st)
	}
	if h := st.GetHistory(); len(h) != 2 || h[0].GetWhat() != "good" || h[0].GetBy() != "health" || h[1].GetWhat() != "started" {
		t.Errorf("history: %v", h)
	}
	b.storage.set(func() {
		if b.storage.marked != 1 {
			t.Errorf("marked good %d times", b.storage.marked)
		}
	})
	if len(b.restarts) != 0 {
		t.Error("the machine was restarted")
	}
	if _, err := os.Stat(b.folder + "/good"); err != nil {
		t.Errorf("PID 1 was not told: %v", err)
	}
}

// A version that does not prove itself in time is left, and says why; the version after it can read that.
func TestNeverGood(t *testing.T) {
	b := newBench(t)
	b.onTrial()
	b.machine.checks = healthy("!kubernetes.converged: left to do: wait for node Ready")
	stop := b.start()
	b.spec(specText)
	b.until("a sign of life", func(s *updatev1.Status) bool { return b.d.book.get().Trial != nil })
	b.mu.Lock()
	b.uptime = 3 * time.Minute
	b.mu.Unlock()
	b.d.loop.Wake()
	select {
	case <-b.restarts:
	case <-time.After(20 * time.Second):
		t.Fatal("no restart")
	}
	stop()
	// The next try knows that, and so does the one after it, though that one's record is another.
	for try := uint32(2); try <= 3; try++ {
		b.storage.slots.Slots[1].TriesDone = try
		b.uptime = 0
		stop = b.start()
		b.spec(specText)
		b.until("its own sign of life", func(s *updatev1.Status) bool { return b.d.book.get().Trial.Try == try })
		b.mu.Lock()
		b.uptime = retryPatience
		b.mu.Unlock()
		b.d.loop.Wake()
		select {
		case <-b.restarts:
		case <-time.After(20 * time.Second):
			t.Fatalf("no restart in try %d", try)
		}
		stop()
	}
	// Then the old version runs.
	b.storage.slots = slots("0.1.0", [2]string{"good", "failed"}, "0.1.0", "0.2.0")
	b.storage.slots.Slots[1].TriesDone = 3
	b.uptime = 0
	stop = b.start()
	st := b.until("the reason", func(s *updatev1.Status) bool { return s.GetFailure() != nil })
	const why = "0.2.0 did not prove its health in 2m0s; missing: kubelet: kubernetes.converged: left to do: wait for node Ready"
	if f := st.GetFailure(); f.GetReason() != why || f.GetTries() != 3 || len(f.GetLines()) != 2 || st.GetSlots()[1].GetDetail() != why {
		t.Errorf("failure: %v", f)
	}
	b.machine.waitFor(t, "0.2.0 was left after 3 tries: ") // it is told after it is written down, and an end in between would be in its way
	stop()
	b.start() // once is enough
	b.until("the same", func(s *updatev1.Status) bool { return s.GetFailure().GetReason() == why })
	b.machine.mu.Lock()
	defer b.machine.mu.Unlock()
	told := 0
	for _, e := range b.machine.events {
		if strings.HasPrefix(e, "0.2.0 was left after 3 tries: ") {
			told++
		}
	}
	if told != 1 {
		t.Errorf("events: %q", b.machine.events)
	}
}

// A panic's last words are kept, once machined can tell them.
func TestPanicked(t *testing.T) {
	b := newBench(t)
	b.storage.slots = slots("0.1.0", [2]string{"good", "failed"}, "0.1.0", "0.2.0")
	b.machine.boots = nil
	b.start()
	b.until("the slots", func(s *updatev1.Status) bool { return len(s.GetSlots()) == 2 })
	b.machine.mu.Lock()
	b.machine.panic = []string{"[ 3.1] a", "[ 3.2] Kernel panic - not syncing: VFS: Unable to mount root fs"}
	b.machine.boots = []*machinev1.Boot{{Number: 7, End: machinev1.Boot_RUNNING}, {Number: 6, End: machinev1.Boot_PANIC, Detail: "VFS: Unable to mount root fs"}, {Number: 5, End: machinev1.Boot_CLEAN}}
	b.machine.mu.Unlock()
	st := b.until("the reason", func(s *updatev1.Status) bool { return s.GetFailure() != nil })
	if st.GetFailure().GetReason() != "the kernel panicked: VFS: Unable to mount root fs" || len(st.GetFailure().GetLines()) != 2 {
		t.Errorf("failure: %v", st.GetFailure())
	}
}

// machined restarts the machine and notes by whose order; if it does not, PID 1 does.
func TestRestarter(t *testing.T) {
	b := newBench(t)
	b.start()
	for _, c := range []struct {
		what   string
		refuse bool
		at     []time.Duration
		want   int // calls to PID 1
	}{
		{"machined does it", false, []time.Duration{0, time.Second}, 0},
		{"machined said that it would", false, []time.Duration{0, time.Second, obeyTime}, 1},
		{"machined does not answer", true, []time.Duration{0}, 1},
	} {
		b.machine.mu.Lock()
		b.machine.boots = []*machinev1.Boot{{Number: 1}}
		if b.machine.reboots = 0; c.refuse {
			b.machine.boots = nil
		}
		b.machine.mu.Unlock()
		now, orders := time.Unix(0, 0), 0
		restart := restarter(b.d.cfg.Machine, func() error { orders++; return nil }, func() time.Time { return now })
		for _, at := range c.at {
			now = time.Unix(0, 0).Add(at)
			must(t, restart())
		}
		b.machine.mu.Lock()
		if orders != c.want || b.machine.reboots != 1 {
			t.Errorf("%s: %d orders to PID 1, %d to machined", c.what, orders, b.machine.reboots)
		}
		b.machine.mu.Unlock()
	}
}

// While storaged does not say what runs, nobody judges, and PID 1 must not think so.
func TestNotJudged(t *testing.T) {
	b := newBench(t)
	b.storage.broken = true
	b.start()
	b.until("the trouble", func(s *updatev1.Status) bool { return strings.Contains(s.GetError(), "ask storaged for the slots") })
	if _, err := os.Stat(b.folder + "/judged"); err == nil {
		t.Error("PID 1 was told that the version is judged")
	}
}

// What a person gives up stays given up, and what a person marks good is good.
func TestByHand(t *testing.T) {
	b := newBench(t)
	b.onTrial()
	b.machine.checks = healthy("!etcd.converged: no leader")
	b.start()
	b.spec(specText)
	b.until("the trial", func(s *updatev1.Status) bool { return len(s.GetProofs()) == 5 })
	r, err := b.update.Rollback(t.Context(), &updatev1.RollbackRequest{})
	if err != nil || r.GetVersion() != "0.1.0" || !r.GetRestart() {
		t.Fatalf("rollback: %v, %v", r, err)
	}
	b.machine.mu.Lock()
	b.machine.checks = healthy()
	b.machine.mu.Unlock()
	b.mu.Lock()
	b.uptime = time.Hour
	b.mu.Unlock()
	b.until("peace", func(s *updatev1.Status) bool { return s.GetConverged() && s.GetSlots()[1].GetStatus() == "given up" })
	b.storage.set(func() {
		if b.storage.marked != 0 {
			t.Error("it was found good after it was given up")
		}
	})
	if len(b.restarts) != 0 {
		t.Error("the machine was restarted")
	}
	m, err := b.update.MarkGood(t.Context(), &updatev1.MarkGoodRequest{})
	if err != nil || m.GetVersion() != "0.2.0" {
		t.Errorf("mark good: %v, %v", m, err)
	}
	b.until("good", func(s *updatev1.Status) bool { return s.GetSlots()[1].GetStatus() == "good" })
}

// Without a boot loader that could start another version, the node is no worse for it.
func TestNoBootLoader(t *testing.T) {
	b := newBench(t)
	b.storage.slots = nil
	b.start()
	b.spec(specText)
	b.until("convergence", func(s *updatev1.Status) bool { return s.GetConverged() && strings.Contains(s.GetError(), "UEFI") })
}

// A journal that cannot be read is put aside, and the daemon goes on.
func TestDamagedJournal(t *testing.T) {
	b := newBench(t)
	must(t, os.WriteFile(filepath.Join(b.folder, journalFile), []byte("{"), 0o600))
	_, data := testImage(t, "0.2.0", 1<<20)
	b.start()
	_, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: serveHTTP(t, content(data)).URL}})
	must(t, err)
	b.until("the history", func(s *updatev1.Status) bool { return len(s.GetHistory()) == 1 })
	if _, err := os.Stat(filepath.Join(b.folder, journalFile+".damaged")); err != nil {
		t.Error(err)
	}
}

// What earlier boots have written is in the first status that was made after STATE was mounted: nobody sees an empty history where there is one.
func TestLateState(t *testing.T) {
	b := newBench(t)
	next := b.folder
	b.folder = filepath.Join(t.TempDir(), "mounted")
	j := journal{}
	j.say(event{Time: time.Unix(1e9, 0), What: "installed", Version: "0.1.0"})
	must(t, j.write(next))
	b.start()
	if st := b.until("a first look", func(s *updatev1.Status) bool { return len(s.GetSlots()) > 0 }); len(st.GetHistory()) != 0 {
		t.Fatalf("a history before STATE is there: %v", st.GetHistory())
	}
	must(t, os.Rename(next, b.folder))
	b.spec(specText)
	st := b.until("a round after that", func(s *updatev1.Status) bool { return s.GetGeneration() > 0 })
	if len(st.GetHistory()) != 1 || st.GetHistory()[0].GetWhat() != "installed" {
		t.Errorf("the history is %v", st.GetHistory())
	}
}

func TestControl(t *testing.T) {
	b := newBench(t)
	b.start()
	// The client is apid here: it may not.
	if _, err := controlv1.NewControlClient(b.conn).SetSpec(t.Context(), &controlv1.SetSpecRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("apid hands out specs: %v", err)
	}
	if _, err := parse([]byte("apiVersion: bulkhead.dev/v1\nkind: Update\nhealth: [luck]\n")); err == nil {
		t.Error("luck is no proof")
	}
}
