package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// maxKernel bounds what unpacking may take; Debian's is 55 MiB.
const maxKernel = 256 << 20

// unpackKernel returns the ELF kernel inside a bzImage that is packed with zstd. QEMU starts it directly (PVH), which
// saves the guest the unpacking: with emulation most of a second.
func unpackKernel(vmlinuz []byte) ([]byte, error) {
	const header = 0x250 // as much of the boot protocol's header as is read here
	if len(vmlinuz) < header || string(vmlinuz[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	le := binary.LittleEndian
	if v := le.Uint16(vmlinuz[0x206:]); v < 0x208 {
		return nil, fmt.Errorf("boot protocol %#x is older than 0x208", v)
	}
	setup := (uint64(vmlinuz[0x1f1]) + 1) * 512
	start := setup + uint64(le.Uint32(vmlinuz[0x248:]))
	end := start + uint64(le.Uint32(vmlinuz[0x24c:]))
	if end > uint64(len(vmlinuz)) || end < start+8 {
		return nil, fmt.Errorf("payload from %d to %d of %d bytes", start, end, len(vmlinuz))
	}
	payload, size := vmlinuz[start:end-4], le.Uint32(vmlinuz[end-4:]) // behind the payload is its unpacked size
	if size > maxKernel {
		return nil, fmt.Errorf("unpacked it has %d bytes, and at most %d are taken", size, maxKernel)
	}
	if !bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return nil, errors.New("not packed with zstd")
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxKernel), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	elf, err := d.DecodeAll(payload, make([]byte, 0, size)) // where memory is slow to get, a slice that grows takes seconds
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	if !bytes.HasPrefix(elf, []byte("\x7fELF")) {
		return nil, errors.New("no ELF file inside")
	}
	return elf, nil
}
