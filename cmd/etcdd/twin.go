//go:build twin

package main

import (
	"github.com/bulkhead-os/bulkhead/test/twin"
)

func init() { twin.Arm("etcdd") }
