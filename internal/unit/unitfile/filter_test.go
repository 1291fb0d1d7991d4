package unitfile

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const (
	kill   = uint32(seccomp.ActionKillProcess)
	allow  = uint32(seccomp.ActionAllow)
	enosys = uint32(seccomp.ActionErrno) | uint32(unix.ENOSYS)
	amd64  = unix.AUDIT_ARCH_X86_64
)

// decide runs a filter as the kernel would. The machine of package bpf reads numbers as they come from the net, so they are written that way, each
// half of an argument by itself.
func decide(t *testing.T, filter []uint64, machine, call uint32, args ...uint64) uint32 {
	t.Helper()
	var program []bpf.Instruction
	for _, f := range filter {
		program = append(program, bpf.RawInstruction{Op: uint16(f), Jt: uint8(f >> 16), Jf: uint8(f >> 24), K: uint32(f >> 32)}.Disassemble())
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data, call)
	binary.BigEndian.PutUint32(data[4:], machine)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

// conditional are the calls of which the arguments count: those of TestFilterArguments.
var conditional = []string{"clone", "clone3", "ioctl", "mmap", "mprotect", "prctl", "prlimit64", "socket"}

// TestFilter asks the program of every unit for every system call that there is.
func TestFilter(t *testing.T) {
	units, err := Load(os.DirFS("../../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		filter, err := Filter(u, false)
		if err != nil {
			t.Fatalf("%s: %v", u.Name, err)
		}
		if (filter == nil) != (u.Syscalls == nil) {
			t.Errorf("%s: %d instructions for %d calls", u.Name, len(filter), len(u.Syscalls))
		}
		if filter == nil {
			continue
		}
		for n := range uint32(600) {
			name, known := arch.X86_64.SyscallNumbers[int(n)]
			want := kill
			if known && slices.Contains(u.Syscalls, name) {
				want = allow
			}
			if slices.Contains(conditional, name) {
				continue
			}
			if got := decide(t, filter, amd64, n); got != want {
				t.Errorf("%s: %q (%d) gives %#x, want %#x", u.Name, name, n, got, want)
			}
		}
		// The same numbers by the doors of 32-bit programs and of x32.
		if got := decide(t, filter, unix.AUDIT_ARCH_I386, unix.SYS_FUTEX); got != kill {
			t.Errorf("%s: a 32-bit call gives %#x", u.Name, got)
		}
		if got := decide(t, filter, amd64, 0x40000000|unix.SYS_FUTEX); got != enosys {
			t.Errorf("%s: a call of x32 gives %#x", u.Name, got)
		}
	}
}

func TestFilterArguments(t *testing.T) {
	daemon := unit.Unit{Syscalls: []string{"clone", "clone3", "ioctl", "mmap", "mprotect", "prctl", "prlimit64", "socket", "write"},
		Sockets: []string{"unix", "netlink:route"}, Ioctls: []uint32{unix.TCGETS, 0x80081272}, Prctls: []uint32{unix.PR_SET_VMA}}
	programs := daemon
	programs.Syscalls = append(slices.Clone(daemon.Syscalls), "waitid")
	const thread = unix.CLONE_THREAD | unix.CLONE_VM | unix.CLONE_FS
	for _, c := range []struct {
		name             string
		number           uint32
		args             []uint64
		daemon, programs uint32
	}{
		{"thread", unix.SYS_CLONE, []uint64{thread}, allow, allow},
		{"thread in a namespace", unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWNET}, kill, kill},
		{"process", unix.SYS_CLONE, []uint64{unix.CLONE_VFORK | unix.CLONE_VM | uint64(unix.SIGCHLD)}, kill, allow},
		{"process for users", unix.SYS_CLONE, []uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, kill, kill},
		{"clone3", unix.SYS_CLONE3, []uint64{1, 88}, enosys, enosys},
		{"memory", unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}, allow, allow},
		{"code", unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, kill, allow},
		{"becomes code", unix.SYS_MPROTECT, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}, kill, allow},
		{"own limit", unix.SYS_PRLIMIT64, []uint64{0, 7}, allow, allow},
		{"another's limit", unix.SYS_PRLIMIT64, []uint64{17, 7}, kill, kill},
		{"unix", unix.SYS_SOCKET, []uint64{unix.AF_UNIX, unix.SOCK_STREAM, 0}, allow, allow},
		{"inet", unix.SYS_SOCKET, []uint64{unix.AF_INET, unix.SOCK_STREAM, 0}, kill, kill},
		{"route", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, allow, allow},
		{"audit", unix.SYS_SOCKET, []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT}, kill, kill},
		{"a high half", unix.SYS_SOCKET, []uint64{1<<32 | unix.AF_UNIX, unix.SOCK_STREAM, 0}, kill, kill},
		{"ioctl", unix.SYS_IOCTL, []uint64{3, 0x80081272}, allow, allow},
		{"another ioctl", unix.SYS_IOCTL, []uint64{3, unix.TIOCSTI}, kill, kill},
		{"prctl", unix.SYS_PRCTL, []uint64{unix.PR_SET_VMA}, allow, allow},
		{"another prctl", unix.SYS_PRCTL, []uint64{unix.PR_SET_PTRACER}, kill, kill},
	} {
		for _, w := range []struct {
			u    unit.Unit
			want uint32
		}{{daemon, c.daemon}, {programs, c.programs}} {
			filter, err := Filter(w.u, false)
			if err != nil {
				t.Fatal(err)
			}
			if got := decide(t, filter, amd64, c.number, c.args...); got != w.want {
				t.Errorf("%s (programs: %v) gives %#x, want %#x", c.name, Programs(w.u), got, w.want)
			}
		}
	}
	filter, err := Filter(daemon, true)
	if err != nil {
		t.Fatal(err)
	}
	if got := decide(t, filter, amd64, unix.SYS_REBOOT); got != uint32(seccomp.ActionLog) {
		t.Errorf("while learning: %#x", got)
	}
}
