package slots

import (
	"io"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

// KernelDir is where kernels are on the EFI partition.
const KernelDir = kernelDir

// KernelRoot returns the root hash of the root that a kernel image starts.
func KernelRoot(r io.ReaderAt, size int64) (bundle.Digest, error) {
	k, err := readKernel(r, size)
	return k.root, err
}

// OpenBlock opens a partition of any disk by its device.
func OpenBlock(node string, size int64, mode Mode) (Part, error) { return openBlock(node, size, mode) }

// Running returns the root hash that a kernel's command line names.
func Running(cmdline string) (bundle.Digest, error) {
	k, err := parseCmdline(cmdline)
	return k.root, err
}
