package syscalls

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestName(t *testing.T) {
	for number, want := range map[int]string{
		unix.SYS_READ: "read (0)", unix.SYS_PTRACE: "ptrace (101)", unix.SYS_CLONE3: "clone3 (435)", unix.SYS_MSEAL: "mseal (462)", -1: "-1", 400: "400", 1 << 20: "1048576",
	} {
		if got := Name(number); got != want {
			t.Errorf("Name(%d) = %q, want %q", number, got, want)
		}
	}
}
