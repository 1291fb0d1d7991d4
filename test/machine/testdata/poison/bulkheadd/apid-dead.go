package main

import (
	"os"
	"path/filepath"
	"time"
)

// apid says that it is ready, and answers nobody.
func init() {
	if filepath.Base(os.Args[0]) == "apid" {
		_, _ = os.NewFile(3, "ready").WriteString("\n")
		for {
			time.Sleep(time.Hour)
		}
	}
}
