package lan

import (
	"bufio"
	"container/heap"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// prefix is the length of what stands before each frame on a connection: the frame's length, big-endian. Frames keep it on their way through the switch.
const prefix = 4

// port is a machine that is connected.
type port struct {
	Port
	conn net.Conn
	wake chan struct{} // of size 1

	received, sent, lost, cut atomic.Uint64 // frames; lost: the queue was full, cut: by rules

	mu    sync.Mutex
	queue frames // guarded by mu
	bytes int    // guarded by mu; in queue
	seq   uint64 // guarded by mu
}

func newPort(p Port, conn net.Conn) *port {
	return &port{Port: p, conn: conn, wake: make(chan struct{}, 1)}
}

// read calls f with each frame that comes in, which f may keep. It ends with the connection.
func (p *port) read(f func([]byte)) error {
	r := bufio.NewReaderSize(p.conn, 64<<10)
	var head [prefix]byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(head[:])
		if n > maxFrame {
			return fmt.Errorf("a frame of %d bytes: this is no QEMU", n)
		}
		buf := make([]byte, prefix+int(n))
		copy(buf, head[:])
		if _, err := io.ReadFull(r, buf[prefix:]); err != nil {
			return err
		}
		p.received.Add(1)
		f(buf)
	}
}

// push queues a frame that is due at a time, or loses it. It never blocks.
func (p *port) push(f []byte, due time.Time) {
	p.mu.Lock()
	if p.bytes+len(f) > maxQueue {
		p.mu.Unlock()
		p.lost.Add(1)
		return
	}
	p.seq++
	heap.Push(&p.queue, queued{f, due, p.seq})
	p.bytes += len(f)
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// write sends what is due until ctx is done or the connection fails.
func (p *port) write(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		batch, wait := p.due(time.Now())
		if len(batch) > 0 {
			n := uint64(len(batch))
			if _, err := batch.WriteTo(p.conn); err != nil {
				return
			}
			p.sent.Add(n)
			continue
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// due takes the frames whose time has come, a bounded number, and says how long to wait if there are none.
func (p *port) due(now time.Time) (batch net.Buffers, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.queue) > 0 && len(batch) < 64 && !p.queue[0].due.After(now) {
		q := heap.Pop(&p.queue).(queued)
		p.bytes -= len(q.frame)
		batch = append(batch, q.frame)
	}
	if len(p.queue) == 0 {
		return batch, time.Hour // push wakes
	}
	return batch, p.queue[0].due.Sub(now)
}

// queued is a frame on its way. Frames of one time keep their order.
type queued struct {
	frame []byte
	due   time.Time
	seq   uint64
}

// frames is a heap: the first one due is on top.
type frames []queued

func (f frames) Len() int      { return len(f) }
func (f frames) Swap(i, j int) { f[i], f[j] = f[j], f[i] }
func (f frames) Less(i, j int) bool {
	if f[i].due.Equal(f[j].due) {
		return f[i].seq < f[j].seq
	}
	return f[i].due.Before(f[j].due)
}
func (f *frames) Push(x any) { *f = append(*f, x.(queued)) }
func (f *frames) Pop() any {
	old := *f
	last := old[len(old)-1]
	old[len(old)-1] = queued{} // the array must not keep the frame
	*f = old[:len(old)-1]
	return last
}
