package main

import "os"

// The kernel panics, soon after the root was mounted.
func init() {
	if os.Getpid() == 1 && len(os.Args) > 2 && os.Args[1] == "supervise" {
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
}
