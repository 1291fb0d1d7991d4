package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// What a connection of a flood says.
var openings = map[string][]byte{
	"idle": nil,
	// A client that is just about to speak: the server waits for the rest of its first frame.
	"half":    []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x06\x04\x00"),
	"garbage": nil, // random bytes, others on each connection
}

// A flood is a set of open connections.
type flood struct {
	mu   sync.Mutex
	open []int // guarded by mu; descriptors
}

// flooded is what came of it.
type flooded struct {
	Connected int // that the kernel took
	Refused   int // because the socket's backlog was full
}

// begin opens connections to a unit's socket, as a user of the node, and keeps them.
func (f *flood) begin(w io.Writer, q url.Values) error {
	name, kind := q.Get("unit"), q.Get("kind")
	opening, known := openings[kind]
	as, err := number(q, "as", 65534)
	n, err2 := number(q, "connections", 1000)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if !known || name == "" || strings.ContainsRune(name, '/') {
		return fmt.Errorf("want unit=NAME and kind=idle, half or garbage, not %q and %q", name, kind)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var out flooded
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: it belongs to another user now
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(as), uintptr(as), uintptr(as)); errno != 0 {
			result <- os.NewSyscallError("setresgid", errno)
			return
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(as), uintptr(as), uintptr(as)); errno != 0 {
			result <- os.NewSyscallError("setresuid", errno)
			return
		}
		for range n {
			fd, err := connect(filepath.Join(unit.SocketDir, name+".sock"))
			switch {
			case err == unix.EAGAIN:
				out.Refused++
				continue
			case err != nil:
				result <- err
				return
			}
			if kind == "garbage" {
				opening = make([]byte, 4<<10)
				_, _ = rand.Read(opening)
			}
			_, _ = unix.Write(fd, opening) // whom the daemon ended already has no more to say
			f.open = append(f.open, fd)
			out.Connected++
		}
		result <- nil
	}()
	if err := <-result; err != nil {
		return err
	}
	return printJSON(w, out)
}

func connect(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		if err == unix.EAGAIN {
			return -1, err
		}
		return -1, fmt.Errorf("connect %s: %w", path, err)
	}
	return fd, nil
}

// end closes all connections and prints how many there were, and how many of them the daemon had ended by itself.
func (f *flood) end(w io.Writer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	ended := 0
	buf := make([]byte, 4<<10)
	for _, fd := range f.open {
		for {
			n, err := unix.Read(fd, buf)
			if n > 0 {
				continue
			}
			if err == nil || err == unix.ECONNRESET {
				ended++
			}
			break
		}
		unix.Close(fd)
	}
	out := map[string]int{"Open": len(f.open), "Ended": ended}
	f.open = nil
	return printJSON(w, out)
}
