package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
)

// read prints length bytes of a file from offset on, or an error and not all of them.
func read(out io.Writer, name, offset, length string) error {
	from, err := strconv.ParseUint(offset, 0, 63)
	if err != nil {
		return fmt.Errorf("offset: %w", err)
	}
	count, err := strconv.ParseUint(length, 0, 63)
	if err != nil {
		return fmt.Errorf("length: %w", err)
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(out, io.NewSectionReader(f, int64(from), int64(count)))
	if err == nil && uint64(n) != count {
		return fmt.Errorf("read %s: the file ends after %d of %d bytes", name, n, count)
	}
	return err
}

func kill(pid string) error {
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 1 {
		return fmt.Errorf("%q is not a process to kill", pid)
	}
	return os.NewSyscallError("kill "+pid, syscall.Kill(n, syscall.SIGKILL))
}
