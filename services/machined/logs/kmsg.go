package logs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxKmsg is the most that the kernel hands out at once, with a record's additions, in bytes.
const maxKmsg = 8 << 10

// Kmsg reads the kernel's log record by record, each once, where Kernel takes it whole: for one who looks often. It needs CAP_SYSLOG.
// Make it with OpenKmsg; one goroutine at a time may use it.
type Kmsg struct{ fd int }

// OpenKmsg opens the device, /dev/kmsg. The oldest record that the kernel still has is the first.
func OpenKmsg(path string) (*Kmsg, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &Kmsg{fd}, nil
}

// Close closes the device.
func (k *Kmsg) Close() error { return os.NewSyscallError("close", unix.Close(k.fd)) }

// Read calls f with each record that is new, and returns when there is none any more. boot is when the kernel's clock was zero. Lines
// that the kernel had no room for any more are missing.
func (k *Kmsg) Read(boot time.Time, f func(level int, l Line)) error {
	var buf [maxKmsg]byte
	for {
		n, err := unix.Read(k.fd, buf[:])
		switch {
		case errors.Is(err, unix.EAGAIN), err == nil && n == 0:
			return nil
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EINTR): // records were overwritten: the next read goes on behind them
			continue
		case err != nil:
			return os.NewSyscallError("read the kernel's log", err)
		}
		if level, at, text, ok := kmsgRecord(string(buf[:n])); ok {
			f(level, Line{boot.Add(at), Clean(text)})
		}
	}
}

// kmsgRecord reads "6,339,5140900,-;text" and leaves out what stands on further lines, which is for machines.
func kmsgRecord(record string) (level int, at time.Duration, text string, ok bool) {
	head, text, ok := strings.Cut(record, ";")
	field := strings.SplitN(head, ",", 4)
	if !ok || len(field) < 3 {
		return 0, 0, "", false
	}
	priority, err := strconv.ParseUint(field[0], 10, 16)
	stamp, serr := strconv.ParseInt(field[2], 10, 62)
	if errors.Join(err, serr) != nil || stamp < 0 || stamp > int64(1<<62/time.Microsecond) {
		return 0, 0, "", false
	}
	text, _, _ = strings.Cut(text, "\n")
	return int(priority & 7), time.Duration(stamp) * time.Microsecond, text, true
}
