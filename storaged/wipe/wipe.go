// Package wipe makes what lies on a partition unreadable, as far as software can: it overwrites what opens encrypted data, lets the disk forget
// the rest, and reads back around the page cache what the disk really has.
//
// It decides nothing: which partition, and whether it may be, is storaged's business. What a disk keeps inside, in spare blocks that nobody can
// address, no program reaches.
package wipe

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Head is how much of a partition's start is overwritten, in bytes: both headers and all keyslots of a LUKS2 volume of ours, which end there.
	Head = 16 << 20
	// Tail is the same of its end, where other formats have signatures.
	Tail = 1 << 20
	// Mark is the part of the head that is overwritten last: while it is not zero, there may be more to do. Both headers lie in it.
	Mark = 1 << 20

	piece = 1 << 20
)

// How says what became of the data between head and tail.
type How string

// The zero value says that nothing was wiped.
const (
	Discarded How = "discarded" // the disk was told to forget them, and took it
	Kept      How = "kept"      // the disk cannot forget: they are there still
)

// A Device is a partition, or a file.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Overwrite writes zeros over head and tail of a device of size bytes. The mark comes last, when all else is on the disk: whenever the power
// fails, a mark that is zero says that no header, no keyslot and no signature is left.
func Overwrite(dev Device, size int64) error {
	head := min(Head, size)
	if err := zero(dev, max(head, size-Tail), size); err != nil {
		return err
	}
	if err := zero(dev, min(Mark, head), head); err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("overwrite: %w", err)
	}
	if err := zero(dev, 0, min(Mark, head)); err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("overwrite: %w", err)
	}
	return nil
}

// zero overwrites a range.
func zero(dev io.WriterAt, from, to int64) error {
	zeros := make([]byte, min(piece, max(0, to-from)))
	for at := from; at < to; at += piece {
		if _, err := dev.WriteAt(zeros[:min(piece, to-at)], at); err != nil {
			return fmt.Errorf("overwrite: %w", err)
		}
	}
	return nil
}

// Check reads head and tail of a device of size bytes, and returns an error unless all is zero.
func Check(dev io.ReaderAt, size int64) error {
	buf, zeros := make([]byte, piece), make([]byte, piece)
	head := min(Head, size)
	for _, part := range [][2]int64{{0, head}, {max(head, size-Tail), size}} {
		for at := part[0]; at < part[1]; at += piece {
			b := buf[:min(piece, part[1]-at)]
			if _, err := dev.ReadAt(b, at); err != nil {
				return fmt.Errorf("read back: %w", err)
			}
			if !bytes.Equal(b, zeros[:len(b)]) {
				return fmt.Errorf("read back: the disk does not keep what was written at byte %d", at)
			}
		}
	}
	return nil
}

// Partition wipes a block device of size bytes and reads it back from the disk. It may be open and in use.
func Partition(path string, size int64) (How, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	how := Discarded
	if err := discard(f, 0, size); err != nil { // it may be that this disk cannot, or not now; what counts is overwritten
		how = Kept
	}
	if err := Overwrite(f, size); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if err := checkDisk(path, size); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return how, nil
}

// Start overwrites the first n bytes of a block device, durably.
func Start(path string, n int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return errors.Join(zero(f, 0, n), f.Sync())
}

// discard tells a block device to forget a range (BLKDISCARD, linux/fs.h).
func discard(f *os.File, from, length int64) error {
	r := [2]uint64{uint64(from), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return fmt.Errorf("BLKDISCARD %s: %w", f.Name(), errno)
	}
	return nil
}

// checkDisk is Check around the page cache, where the file system knows how.
func checkDisk(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) { // no such thing here: a file on a tmpfs
		f, err = os.Open(path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	// Pages of the kernel's: O_DIRECT wants aligned memory.
	buf, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	return errors.Join(Check(aligned{f, buf}, size), unix.Munmap(buf))
}

// aligned reads through a buffer of its own, at most a piece at once.
type aligned struct {
	f   *os.File
	buf []byte
}

func (a aligned) ReadAt(p []byte, at int64) (int, error) {
	n, err := a.f.ReadAt(a.buf[:len(p)], at)
	return copy(p, a.buf[:n]), err
}
