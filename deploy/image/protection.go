package image

import "github.com/bulkhead-os/bulkhead/internal/hardening"

// panicMemory keeps memory for two of ramoops' records.
const panicMemory = "reserve_mem=128K:4096:oops"

// protection is the words of the kernel command line that protect the kernel, and keep its last lines.
func protection() string { return panicMemory + " " + hardening.CommandLine() }
