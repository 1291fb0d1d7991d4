package supervise

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

const logSize = 1 << 20

// A logPipe takes what a unit writes to its standard output and error. It lives as long as PID 1, so that no line is lost while
// the unit or the log's reader is started again.
type logPipe struct {
	read, write int
	size        int // bytes
	lost        int // bytes that nobody read in time
}

func newLog() (l logPipe, err error) {
	var p [2]int
	if err = unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return l, os.NewSyscallError("log pipe", err)
	}
	unix.SetNonblock(p[0], true) // not the other end: a program may not expect that of its standard output
	for size := logSize; l.size == 0; size /= 2 {
		l.size, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, size)
		if size <= 1<<16 { // what a pipe has by itself
			l.size = 1 << 16
		}
	}
	l.read, l.write = p[0], p[1]
	return l, nil
}

// relieve drops the older half of a pipe that nobody empties: the unit would block on it. It says whether to look again soon.
func (l *logPipe) relieve(name string) (soon bool) {
	n, err := unix.IoctlGetInt(l.read, unix.TIOCINQ)
	if err != nil || n <= l.size/4 {
		return false
	}
	// A pipe counts pages, so that it may be full with half of its bytes.
	poll := []unix.PollFd{{Fd: int32(l.write), Events: unix.POLLOUT}}
	unix.Poll(poll, 0)
	if n <= l.size/4*3 && poll[0].Revents&unix.POLLOUT != 0 {
		return true
	}
	if l.lost == 0 {
		console.Say("unit ", name, ": nobody reads its log, the oldest ", strconv.Itoa(n/2), " bytes are dropped, and so will be others")
	}
	// Spliced, not read: who has the read end could make that block.
	if null, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		gone, _ := unix.Splice(l.read, nil, null, nil, n/2, unix.SPLICE_F_NONBLOCK)
		l.lost += int(max(gone, 0))
		unix.Close(null)
	}
	return true
}
