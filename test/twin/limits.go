package twin

import (
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// bounded is how much is written where a file can be made: enough to see that nobody hinders it.
const bounded = 1 << 20

// limits takes what there is until there is no more. The last two end the process.
func limits() (out []Probe) {
	out = append(out, Probe{Group: Descriptors, Name: "open as many as there can be", Calls: []string{"fcntl"}, run: descriptors})
	fill := func(path, owner string, mode uint32) {
		out = append(out, Probe{Group: Disk, Name: "fill " + path, Path: path, Owner: owner, Mode: mode, Write: true, Calls: []string{"openat", "write"}, run: func(e *env) string { return fill(filepath.Join(path, "twin-fill-"+e.name)) }})
	}
	for _, d := range Daemons() {
		if mode := runtimes[d]; mode != 0 {
			fill(filepath.Join(unit.RunDir, d), d, mode)
		}
	}
	for _, d := range states {
		fill(filepath.Join(unit.StateDir, d), d, 0o700)
	}
	for _, p := range []string{"/", "/dev", "/run", "/state", "/usr", "/var"} {
		fill(p, "", 0o755)
	}
	fill("/dev/shm", "", 0o1777)
	fill("/tmp", "", 0o1777)
	return append(out,
		Probe{Group: Threads, Name: "start as many as there can be", run: threads},
		Probe{Group: Memory, Name: "take as much as there is", Calls: []string{"mmap"}, run: func(*env) string { return memory() }},
	)
}

// descriptors returns how many can be open: all are closed at once.
func descriptors(e *env) string {
	var all []int
	defer func() {
		for _, fd := range all {
			_ = unix.Close(fd)
		}
	}()
	for range e.limit + 1 {
		fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			if err == unix.EMFILE && len(all) > 0 {
				return itoa(all[len(all)-1] + 1)
			}
			return says(err)
		}
		all = append(all, fd)
	}
	return "no limit"
}

func fill(path string) string {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return says(err)
	}
	defer unix.Close(fd)
	defer func() { _ = unix.Unlink(path) }()
	for range bounded >> 16 {
		if _, err := unix.Write(fd, make([]byte, 1<<16)); err != nil {
			return says(err)
		}
	}
	return OK
}

// threads starts threads, and says how many, until Go's runtime gives up, which ends the process.
func threads(e *env) string {
	for n := range 100_000 {
		e.count(n)
		started := make(chan bool)
		go func() {
			runtime.LockOSThread()
			started <- true
			select {} // the thread is kept for it
		}()
		<-started
	}
	return "no limit"
}

// memory takes memory and writes into it until the kernel ends the process.
func memory() string {
	const piece = 4 << 20
	for range 4096 { // 16 GiB, more than a test's machine has
		b, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return says(err)
		}
		// All of it in one call: page by page, an emulated machine takes minutes for nine daemons.
		if err := unix.Madvise(b, unix.MADV_POPULATE_WRITE); err != nil {
			return says(err)
		}
	}
	return "no limit"
}
