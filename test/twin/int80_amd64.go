package twin

import (
	"runtime/debug"
	"syscall"
)

func int80raw(n uint32) int32

// int80 makes a system call by the gate of i386, whose numbers are others: a filter that only looks at numbers would take them for its own. There is none on a machine
// whose hypervisor leaves the gate out; there is false then: the processor faults, before any kernel could look at a filter.
func int80(n uint32) (errno syscall.Errno, there bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { _ = recover() }()
	r := int80raw(n)
	if r < 0 && r > -4096 {
		errno = syscall.Errno(-r)
	}
	return errno, true
}

// int80Probe tries getpid by that gate.
func int80Probe() string {
	errno, there := int80(20)
	if !there {
		return NoGate
	}
	return passed(errno)
}
