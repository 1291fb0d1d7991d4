package twin

import "syscall"

func int80raw(n uint32) int32

// int80 makes a system call by the gate of i386, whose numbers are others: a filter that only looks at numbers would take them for its own.
func int80(n uint32) syscall.Errno {
	if r := int80raw(n); r < 0 && r > -4096 {
		return syscall.Errno(-r)
	}
	return 0
}
