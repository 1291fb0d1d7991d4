//go:build twin

package main

import (
	"os"
	"path/filepath"

	"github.com/bulkhead-os/bulkhead/test/twin"
)

func init() { twin.Arm(filepath.Base(os.Args[0])) }
