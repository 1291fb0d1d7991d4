package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// reserve is what a machine's disk may take on the host before anybody notices: a node with Kubernetes needs about 2 GiB.
	reserve = 3 << 30
	mib     = 1 << 20
)

// Check says what this host lacks to run the machine, and what to do about it, one line for each thing. Start calls it.
func (m Machine) Check() error {
	var errs []error
	if _, err := exec.LookPath(program); err != nil {
		errs = append(errs, fmt.Errorf("%s is missing: install the package qemu-system-x86 (on Debian and Ubuntu)", program))
	}
	errs = append(errs, m.checkFirmware())
	if free, ok := FreeMemory(); ok && free < m.Memory {
		errs = append(errs, fmt.Errorf("memory: %d MiB are free and machine %s takes %d: end something, or give it less with --memory", free, m.Name, m.Memory))
	}
	for _, f := range m.Forwards {
		if f.Host != 0 {
			errs = append(errs, portFree(f))
		}
	}
	return errors.Join(errs...)
}

func portFree(f Forward) error {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(f.Host)))
	if err == nil {
		return l.Close()
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		err = errors.New("is taken")
	case errors.Is(err, unix.EACCES):
		err = errors.New("is for root only")
	}
	hint := ""
	if f.Flag != "" {
		hint = ": choose another with " + f.Flag
	}
	return fmt.Errorf("port %d of 127.0.0.1 (%s) %w%s", f.Host, f.Name, err, hint)
}

// choosePorts replaces the zeros by ports that are free now.
func (m *Machine) choosePorts() error {
	for i := range m.Forwards {
		if m.Forwards[i].Host != 0 {
			continue
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close() // not before all are chosen, or two may be the same
		m.Forwards[i].Host = l.Addr().(*net.TCPAddr).Port
	}
	return nil
}

// FreeMemory returns what of this host's memory could be used without swapping, in MiB; false if that cannot be told.
func FreeMemory() (int, bool) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, false
	}
	return memAvailable(string(text))
}

func memAvailable(meminfo string) (int, bool) {
	for line := range strings.Lines(meminfo) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemAvailable:" {
			n, err := strconv.Atoi(f[1])
			return n >> 10, err == nil
		}
	}
	return 0, false
}

// roomFor says whether the disk has a chance to fit.
func (m Machine) roomFor(image string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(m.Dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", m.Dir, err)
	}
	free := int64(fs.Bavail) * fs.Bsize
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return err
	}
	if need := min(m.DiskSize, st.Blocks*512+reserve); free < need {
		return fmt.Errorf("disk: %d MiB are free in %s and a machine takes about %d: free some, or set BULKHEAD_MACHINES to a folder elsewhere",
			free/mib, m.Dir, need/mib)
	}
	return nil
}
