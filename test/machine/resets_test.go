package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// eventSocket is where QEMU tells what happens to a machine of upFirmware, in its folder.
const eventSocket = "events.sock"

// A start of a machine, by a reset, and when it answered a call for the first time.
type start struct{ began, answered time.Time }

func (s start) String() string {
	if s.answered.IsZero() {
		return s.began.Format(time.TimeOnly) + " without an answer"
	}
	return fmt.Sprintf("%s, answered after %s", s.began.Format(time.TimeOnly), s.answered.Sub(s.began).Round(time.Second))
}

// A watch notes a running machine's resets, and calls it as its user all the time.
type watch struct {
	n    *node
	stop func()

	mu     sync.Mutex
	starts []start // guarded by mu
}

// watch begins. A machine that was only just powered on counts as started now.
func (n *node) watch(t *testing.T, m qemu.Machine) *watch {
	t.Helper()
	conn, err := net.Dial("unix", filepath.Join(m.Dir, eventSocket))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte(`{"execute":"qmp_capabilities"}`)); err != nil {
		t.Fatal(err)
	}
	w := &watch{n: n}
	if since := m.Status().Since; time.Since(since) < 10*time.Second {
		w.starts = append(w.starts, start{began: since})
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	wait.Go(func() { w.listen(conn) })
	creds := n.credentials(t)
	wait.Go(func() { w.call(ctx, creds) })
	w.stop = sync.OnceFunc(func() {
		cancel()
		conn.Close()
		wait.Wait()
	})
	t.Cleanup(w.stop)
	return w
}

// listen notes resets until the connection ends.
func (w *watch) listen(conn net.Conn) {
	dec := json.NewDecoder(conn)
	for {
		var e struct {
			Event     string
			Timestamp struct{ Seconds, Microseconds int64 }
		}
		if dec.Decode(&e) != nil {
			return
		}
		if e.Event == "RESET" {
			w.mu.Lock()
			w.starts = append(w.starts, start{began: time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000)})
			w.mu.Unlock()
		}
	}
}

// call asks for the node's version until ctx is done, by a new connection each time: QEMU accepts for a guest that is not there yet.
func (w *watch) call(ctx context.Context, creds client.Credentials) {
	ask := func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", w.n.apiPort), creds)
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
		return err
	}
	for ctx.Err() == nil {
		w.mu.Lock()
		before := len(w.starts)
		w.mu.Unlock()
		if ask() == nil {
			w.mu.Lock()
			if now := len(w.starts); now > 0 && now == before && w.starts[now-1].answered.IsZero() {
				w.starts[now-1].answered = time.Now()
			}
			w.mu.Unlock()
		}
		wait(ctx, 500*time.Millisecond)
	}
}

// boots returns what the watch saw, once the newest start has answered, and ends it.
func (w *watch) boots(t *testing.T) []start {
	t.Helper()
	eventually(t, 3*time.Minute, "the machine answers", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if n := len(w.starts); n == 0 || w.starts[n-1].answered.IsZero() {
			return fmt.Errorf("starts: %v", w.starts)
		}
		return nil
	})
	w.stop()
	return w.starts
}
