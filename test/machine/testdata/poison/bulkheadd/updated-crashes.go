package main

import (
	"os"
	"path/filepath"
)

// updated, which would leave this version, ends as soon as it is started.
func init() {
	if filepath.Base(os.Args[0]) == "updated" {
		os.Exit(3)
	}
}
