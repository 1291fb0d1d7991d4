package supervise

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

// maxName is what fits the kernel, a Kubernetes label and Machine.hostname, in bytes.
const maxName = 63

// A Hostname says where the machine's own name stands. networkd, which knows it, may not set it: that takes CAP_SYS_ADMIN. The zero value is nowhere.
type Hostname struct {
	// File has the name and a newline. It counts only while it is a plain file of Owner's.
	File  string
	Owner uint32

	get  func() string
	set  func(name string) error
	said string // the last complaint
}

// Name makes the kernel's host name follow a file: what has no name of its own, like units and pods in the host's network, sees it. It is compared each second,
// so that what a privileged pod sets does not stay.
func (s *Supervisor) Name(h Hostname) {
	s.hostname = h
	s.hostname.get, s.hostname.set = kernelName, func(name string) error { return unix.Sethostname([]byte(name)) }
}

// follow looks once. While there is no file, the name stays what it is. What is wrong is told once.
func (h *Hostname) follow() {
	if h.File == "" {
		return
	}
	said := ""
	switch name, err := h.read(); {
	case err == unix.ENOENT:
	case err != nil:
		said = err.Error()
	case !isName(name):
		said = "it is no host name; those have 1 to 63 lower-case letters, digits, - and ."
	case name != h.get():
		if err := h.set(name); err != nil {
			said = err.Error()
		}
	}
	if said != h.said && said != "" {
		console.Say("bulkhead: host name from ", h.File, ": ", said)
	}
	h.said = said
}

// read opens what another user may have put there: it follows no link and waits for nobody.
func (h *Hostname) read() (string, error) {
	fd, err := unix.Open(h.File, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", os.NewSyscallError("stat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != h.Owner {
		return "", unix.EPERM
	}
	var b [maxName + 2]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return "", os.NewSyscallError("read", err)
	}
	if n > 0 && b[n-1] == '\n' {
		n--
	}
	return string(b[:n]), nil
}

// isName is the rule of Machine.hostname as far as the kernel and the console care: nothing that could be mistaken for something else.
func isName(s string) bool {
	for i := range len(s) {
		c := s[i]
		inner := (c == '-' || c == '.') && i > 0 && i < len(s)-1
		if !inner && (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return len(s) > 0 && len(s) <= maxName
}

func kernelName() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Nodename[:])
}
