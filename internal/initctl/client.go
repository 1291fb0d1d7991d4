package initctl

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// initSocket is unit.InitSocket; package unit is not imported for one name.
const initSocket = "/run/bulkhead/sock/init.sock"

// answerTime bounds the wait for any answer but Watch's: PID 1 answers from memory.
const answerTime = 5 * time.Second

// Status is a unit as PID 1 sees it.
type Status struct {
	Name     string
	State    string // down, starting, up, stopping, cycling (stopping, to be started again) or waiting (for its restart)
	PID      int    // 0 if it has no process
	Restarts uint32 // starts since the boot that nobody had asked for
	Since    time.Time
	LastExit string // "", "exit 1", "killed by SIGKILL", "not started: ..."
}

// A Client is a connection to PID 1. It may be used by several goroutines; their calls follow one another.
// Errors of PID 1 are a Code: errors.Is(err, initctl.Denied).
type Client struct {
	path string

	mu sync.Mutex
	f  *os.File // guarded by mu; nil when it has to be made anew
}

// Dial connects to PID 1; path "" is the node's own control socket.
// A connection lost later is made again by the call that finds it so.
func Dial(path string) (*Client, error) {
	if path == "" {
		path = initSocket
	}
	f, err := connect(path)
	if err != nil {
		return nil, err
	}
	return &Client{path: path, f: f}, nil
}

// Start asks for the unit to run, and returns when PID 1 has taken note: Watch shows what comes of it.
// Starting a unit that runs changes nothing.
func (c *Client) Start(unit string) error { return c.order(Start, unit) }

// Stop asks for the unit not to run, and returns when PID 1 has taken note.
func (c *Client) Stop(unit string) error { return c.order(Stop, unit) }

// Restart is Stop and Start in one: the unit gets a new process, also if it was down.
func (c *Client) Restart(unit string) error { return c.order(Restart, unit) }

// Reboot stops everything in order and restarts the machine.
func (c *Client) Reboot() error { return c.order(Reboot, "") }

// PowerOff stops everything in order and turns the machine off.
func (c *Client) PowerOff() error { return c.order(PowerOff, "") }

func (c *Client) order(v Verb, unit string) error {
	return c.ask(Request{v, unit}, func(Record, int) error { return nil })
}

// Status returns every unit, sorted by name.
func (c *Client) Status() ([]Status, error) {
	var all []Status
	err := c.ask(Request{Verb: List}, func(r Record, _ int) error {
		all = append(all, status(r))
		return nil
	})
	return all, err
}

// Logs returns the read end of the unit's log pipe, which holds what no reader has taken so far. The file is the caller's and in
// non-blocking mode: closing it, or a read deadline, ends a Read. Two readers of one unit share its lines out between them.
func (c *Client) Logs(unit string) (*os.File, error) {
	var log *os.File
	err := c.ask(Request{Logs, unit}, func(r Record, fd int) error {
		if fd < 0 {
			return ErrMalformed
		}
		log = os.NewFile(uintptr(fd), "log of "+unit)
		return nil
	})
	return log, err
}

// Watch calls f with every unit, and again with each one that changes, until ctx is done or the connection is lost.
// It never returns nil. A caller that is slow misses states in between, never the last one. It uses a connection of its own.
func (c *Client) Watch(ctx context.Context, f func(Status)) error {
	conn, err := connect(c.path)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err = send(conn, Request{Verb: Follow}); err != nil {
		return err
	}
	for {
		r, _, err := receive(conn)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		f(status(r))
	}
}

// Close ends the connection. Calls after it fail.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.path = ""
	return c.drop()
}

func (c *Client) drop() error { // mu is held
	if c.f == nil {
		return nil
	}
	err := c.f.Close()
	c.f = nil
	return err
}

// ask sends one request and hands every record of the answer to each.
func (c *Client) ask(req Request, each func(Record, int) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.path == "" {
		return os.ErrClosed
	}
	for sent := false; !sent; {
		fresh := c.f == nil
		if fresh {
			f, err := connect(c.path)
			if err != nil {
				return err
			}
			c.f = f
		}
		c.f.SetDeadline(time.Now().Add(answerTime))
		if err := send(c.f, req); err == nil {
			sent = true
		} else if c.drop(); fresh {
			return err
		} // else PID 1 had closed the old connection and took nothing of this request: once more on a fresh one
	}
	for {
		r, fd, err := receive(c.f)
		if err != nil {
			if !errors.As(err, new(Code)) || errors.Is(err, Invalid) || errors.Is(err, Busy) {
				c.drop() // it is unknown what comes next, or nothing will
			}
			return err
		}
		if err = each(r, fd); err != nil {
			c.drop()
			return err
		}
		if r.Left == 0 {
			return nil
		}
	}
}

func status(r Record) Status {
	return Status{
		Name: r.Unit, State: states[r.State], PID: int(r.PID), Restarts: r.Restarts,
		Since: time.Unix(0, r.Since), LastExit: r.Ending(),
	}
}

func connect(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err == nil { // PID 1 accepts, or the backlog does
		err = unix.SetNonblock(fd, true) // so that deadlines work
	}
	if err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func send(f *os.File, r Request) error {
	p := r.Encode()
	_, err := f.Write(p[:])
	return err
}

// receive reads one record; a code other than OK is the error. fd is -1, or a descriptor that came with the record.
func receive(f *os.File) (r Record, fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return Record{}, -1, err
	}
	var buf [RecordSize + 1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	var rerr error
	err = raw.Read(func(s uintptr) bool {
		n, oobn, _, _, rerr = unix.Recvmsg(int(s), buf[:], oob, unix.MSG_CMSG_CLOEXEC)
		return rerr != unix.EAGAIN
	})
	if err == nil {
		err = os.NewSyscallError("recvmsg", rerr)
	}
	if err == nil && n == 0 {
		err = errors.New("init: connection closed")
	}
	if err != nil {
		return Record{}, -1, err
	}
	fd = rights(oob[:oobn])
	if r, err = DecodeRecord(buf[:n]); err == nil && r.Code != OK {
		err = r.Code
	}
	if err != nil && fd >= 0 {
		unix.Close(fd)
		fd = -1
	}
	return r, fd, err
}

func rights(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return -1
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1
	}
	return fds[0]
}
