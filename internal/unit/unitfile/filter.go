package unitfile

import (
	"slices"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// namespaces are the flags of clone(2) that make one. CLONE_NEWTIME is none of them: there its bit is part of the signal.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Programs says whether the unit may start other programs: only then may it make processes, which it has to wait for, and have code mapped.
func Programs(u unit.Unit) bool { return u.Syscalls == nil || slices.Contains(u.Syscalls, "waitid") }

// Filter assembles the seccomp program that holds a unit to its system calls; nil if it may use all. What is not listed ends the process. If learn
// is true it is written to the kernel's log instead, and done: for finding out what a unit needs, never for an image that anybody else gets.
func Filter(u unit.Unit, learn bool) ([]uint64, error) {
	if u.Syscalls == nil {
		return nil, nil
	}
	policy := seccomp.Policy{DefaultAction: seccomp.ActionKillProcess, Syscalls: groupsOf(u)}
	if learn {
		policy.DefaultAction = seccomp.ActionLog
	}
	program, err := policy.Assemble()
	if err != nil {
		return nil, err
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, err
	}
	filter := make([]uint64, len(raw))
	for i, r := range raw { // struct sock_filter, as it lies in the memory of a little-endian machine
		filter[i] = uint64(r.Op) | uint64(r.Jt)<<16 | uint64(r.Jf)<<24 | uint64(r.K)<<32
	}
	return filter, nil
}

// Answer returns a filter that answers with an error where the given one ends the process: for the evil twins, who try all that is not allowed, and
// could tell nobody afterwards. Never for an image that anybody else gets.
func Answer(filter []uint64, errno unix.Errno) []uint64 {
	const end = unix.BPF_RET | unix.BPF_K | unix.SECCOMP_RET_KILL_PROCESS<<32
	out := slices.Clone(filter)
	for i, instruction := range out {
		if instruction == end {
			out[i] = unix.BPF_RET | unix.BPF_K | (unix.SECCOMP_RET_ERRNO|uint64(errno))<<32
		}
	}
	return out
}

// groupsOf is what the unit may do, in the library's words.
func groupsOf(u unit.Unit) []seccomp.SyscallGroup {
	allow := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	// clone3 keeps its flags in memory, where a filter does not see them; who is told that there is none takes clone.
	none := seccomp.SyscallGroup{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)}
	when := func(call string, conditions ...seccomp.Condition) {
		allow.NamesWithCondtions = append(allow.NamesWithCondtions, seccomp.NameWithConditions{Name: call, Conditions: conditions})
	}
	is := func(argument, value uint32) seccomp.Condition {
		return seccomp.Condition{Argument: argument, Operation: seccomp.Equal, Value: uint64(value)}
	}
	lacks := func(argument uint32, bits uint64) seccomp.Condition {
		return seccomp.Condition{Argument: argument, Operation: seccomp.BitsNotSet, Value: bits}
	}
	for _, call := range u.Syscalls {
		switch {
		case call == "clone3":
			none.Names = append(none.Names, call)
		case call == "clone" && Programs(u):
			when(call, lacks(0, namespaces))
		case call == "clone": // threads
			when(call, lacks(0, namespaces), seccomp.Condition{Argument: 0, Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD})
		case (call == "mmap" || call == "mprotect") && !Programs(u): // all its code was mapped when it was started
			when(call, lacks(2, unix.PROT_EXEC))
		case call == "prlimit64": // its own
			when(call, is(0, 0))
		case call == "ioctl":
			for _, request := range u.Ioctls {
				when(call, is(1, request))
			}
		case call == "prctl":
			for _, option := range u.Prctls {
				when(call, is(0, option))
			}
		case call == "socket":
			for _, name := range u.Sockets {
				f := sockets[name]
				if f.protocol < 0 {
					when(call, is(0, f.domain))
				} else {
					when(call, is(0, f.domain), is(2, uint32(f.protocol)))
				}
			}
		default:
			allow.Names = append(allow.Names, call)
		}
	}
	return []seccomp.SyscallGroup{allow, none}
}
