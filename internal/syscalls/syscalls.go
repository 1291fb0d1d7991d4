// Package syscalls knows the names of the kernel's system calls on x86-64, for people who read their numbers. It does nothing else.
package syscalls

import (
	"strconv"
	"strings"
)

//go:generate go run ../unit/gen -names names.go

// Name is the name of a system call and its number, "ptrace (101)"; only the number if there is no name for it.
func Name(number int) string {
	list := strings.Fields(names)
	if number < 0 || number >= len(list) || list[number] == "-" {
		return strconv.Itoa(number)
	}
	return list[number] + " (" + strconv.Itoa(number) + ")"
}
