package slots

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Linux is the system disk of this machine. Make it with NewLinux.
type Linux struct {
	sys, dev, proc string // "/sys", "/dev", "/proc", but for tests
	// edit changes the partition table of a disk in the order that survives a power cut.
	edit func(disk string, change func(*gpt.Table) error) error
	// system returns the name of the disk that the root file system is on, "" if that cannot be told.
	system func() string
	// notMedia are the names of devices that never hold a bundle: made by others out of disks.
	notMedia []string
}

// NewLinux returns the machine's disk. edit must be the one way in which the partition table is written; system returns the name of the disk that
// the root file system is on.
func NewLinux(edit func(disk string, change func(*gpt.Table) error) error, system func() string) *Linux {
	return &Linux{"/sys", "/dev", "/proc", edit, system, []string{"loop", "ram", "zram", "dm-", "md", "mtdblock"}}
}

// kernel reads what the running kernel was told.
func (l *Linux) kernel() (kernel, error) {
	line, err := os.ReadFile(filepath.Join(l.proc, "cmdline"))
	if err != nil {
		return kernel{}, err
	}
	return parseCmdline(string(line))
}

// find returns the name of the disk that the running root is on, and its table. Several disks may have such a root, as an installation
// medium and the disk that was made from it: the one in use counts.
func (l *Linux) find(running bundle.Digest) (disk string, t gpt.Table, err error) {
	all, err := os.ReadDir(filepath.Join(l.sys, "class/block"))
	if err != nil {
		return "", gpt.Table{}, err
	}
	system := l.system()
	for _, e := range all {
		if _, err := os.Stat(filepath.Join(l.sys, "class/block", e.Name(), "partition")); err == nil {
			continue
		}
		other, err := readTable(filepath.Join(l.dev, e.Name()))
		if _, ok := other.ByGUID(gpt.GUID(running[:16])); err != nil || !ok || disk != "" && e.Name() != system {
			continue
		}
		disk, t = e.Name(), other
	}
	if disk == "" {
		return "", gpt.Table{}, fmt.Errorf("no disk has a partition with the GUID of the running root %s", running)
	}
	return disk, t, nil
}

// readTable reads a disk's partition table, as it is now.
func readTable(path string) (gpt.Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return gpt.Table{}, err
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // it may have been read before it was changed
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return gpt.Table{}, err
	}
	t, _, err := gpt.Read(f, size)
	return t, err
}

// Look reads command line and table.
func (l *Linux) Look(context.Context) (Layout, error) {
	if _, err := os.Stat(filepath.Join(l.sys, "firmware/efi")); err != nil {
		return Layout{}, errs.New(errs.Precondition, "this machine was not started by UEFI: there is no boot loader that could start another version")
	}
	k, err := l.kernel()
	if err != nil {
		return Layout{}, fmt.Errorf("the running kernel: %w", err)
	}
	_, t, err := l.find(k.root)
	if err != nil {
		return Layout{}, err
	}
	out := Layout{Running: k.root, Epoch: k.epoch}
	for i := range 2 {
		root, okRoot := t.ByName(string(rootName(i)))
		tree, okTree := t.ByName(string(treeName(i)))
		if !okRoot || !okTree {
			return Layout{}, errs.New(errs.Precondition, "the system disk has no partitions %s and %s", rootName(i), treeName(i))
		}
		out.Slots[i] = bundle.Digest(append(root.GUID[:], tree.GUID[:]...))
		out.Root[i], out.Tree[i] = root.Size(), tree.Size()
	}
	return out, nil
}

// Open opens a partition of the system disk by its name in the table.
func (l *Linux) Open(name PartName, mode Mode) (Part, error) {
	k, err := l.kernel()
	if err != nil {
		return nil, err
	}
	disk, t, err := l.find(k.root)
	if err != nil {
		return nil, err
	}
	p, ok := t.ByName(string(name))
	if !ok {
		return nil, errs.New(errs.Precondition, "the system disk has no partition %s", name)
	}
	node, err := l.node(disk, p)
	if err != nil {
		return nil, err
	}
	return openBlock(node, p.Size(), mode)
}

// node returns the device of a partition, if the kernel has it in the place that the table says.
func (l *Linux) node(disk string, p gpt.Partition) (string, error) {
	at := filepath.Join(l.sys, "class/block", disk)
	all, err := os.ReadDir(at)
	if err != nil {
		return "", err
	}
	for _, e := range all {
		if attr(filepath.Join(at, e.Name(), "partition")) != int64(p.Number) {
			continue
		}
		if start, size := sectors(filepath.Join(at, e.Name(), "start")), sectors(filepath.Join(at, e.Name(), "size")); start != p.Start() || size != p.Size() {
			return "", fmt.Errorf("the kernel has %s at byte %d, %d long, the table says %d and %d; restart the machine", p.Name, start, size, p.Start(), p.Size())
		}
		return filepath.Join(l.dev, e.Name()), nil
	}
	return "", fmt.Errorf("the kernel does not know partition %d (%s) of %s", p.Number, p.Name, disk)
}

// Label writes the two GUIDs.
func (l *Linux) Label(slot int, root bundle.Digest) error {
	k, err := l.kernel()
	if err != nil {
		return err
	}
	disk, _, err := l.find(k.root)
	if err != nil {
		return err
	}
	return l.edit(filepath.Join(l.dev, disk), func(t *gpt.Table) error {
		done := 0
		for i := range t.Partitions {
			switch p := &t.Partitions[i]; PartName(p.Name) {
			case rootName(slot):
				p.GUID = gpt.GUID(root[:16])
				done++
			case treeName(slot):
				p.GUID = gpt.GUID(root[16:])
				done++
			}
		}
		if done != 2 {
			return fmt.Errorf("the table has %d partitions of slot %s", done, Label(slot))
		}
		return nil
	})
}

// forgetEvery is after how many bytes the kernel is told that it may forget what was read and written: an upgrade must not push other
// programs' files out of memory.
const forgetEvery = 4 << 20

// A block is an open partition.
type block struct {
	f      *os.File
	size   int64
	moved  atomic.Int64
	direct *direct // nil: through the page cache
}

func openBlock(node string, size int64, mode Mode) (Part, error) {
	flags := os.O_RDONLY
	switch mode {
	case Write:
		flags = os.O_RDWR | unix.O_EXCL // refused while it is mounted
	case Direct:
		flags = os.O_RDONLY | unix.O_DIRECT
	}
	f, err := os.OpenFile(node, flags, 0)
	if mode == Direct && errors.Is(err, unix.EINVAL) { // no such thing here: a file on a tmpfs
		f, err = os.Open(node)
	}
	if err != nil {
		return nil, err
	}
	b := &block{f: f, size: size}
	if mode == Direct {
		if b.direct, err = newDirect(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return b, nil
}

func (b *block) Size() int64 { return b.size }

func (b *block) Close() error {
	if b.direct != nil {
		return errors.Join(unix.Munmap(b.direct.buf), b.f.Close())
	}
	b.forget()
	return b.f.Close()
}

// forget drops clean pages. It is advice: no harm if refused.
func (b *block) forget() { _ = unix.Fadvise(int(b.f.Fd()), 0, 0, unix.FADV_DONTNEED) }

func (b *block) ReadAt(p []byte, at int64) (int, error) {
	if at < 0 || at >= b.size {
		return 0, io.EOF
	}
	short := at+int64(len(p)) > b.size
	if short {
		p = p[:b.size-at]
	}
	read := b.f.ReadAt
	if b.direct != nil {
		read = b.direct.ReadAt
	} else if b.moved.Add(int64(len(p))) > forgetEvery {
		b.moved.Store(0)
		b.forget()
	}
	n, err := read(p, at)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

func (b *block) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > b.size {
		return 0, fmt.Errorf("%s: bytes %d to %d of %d", b.f.Name(), at, at+int64(len(p)), b.size)
	}
	return b.f.WriteAt(p, at)
}

// Sync returns when all is on the disk, and not only on its way there.
func (b *block) Sync() error {
	if err := unix.Fdatasync(int(b.f.Fd())); err != nil {
		return os.NewSyscallError("fdatasync "+b.f.Name(), err)
	}
	b.forget()
	return nil
}

// A direct reads around the page cache, in aligned pieces, of which it keeps the last.
type direct struct {
	f    *os.File
	buf  []byte // whole pages, as O_DIRECT wants them
	at   int64
	have int
}

const (
	directSize  = 256 << 10
	directAlign = 4096
)

func newDirect(f *os.File) (*direct, error) {
	buf, err := unix.Mmap(-1, 0, directSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return &direct{f: f, buf: buf}, os.NewSyscallError("mmap", err)
}

// ReadAt is for one goroutine.
func (d *direct) ReadAt(p []byte, at int64) (done int, err error) {
	for done < len(p) {
		here := at + int64(done)
		if d.have == 0 || here < d.at || here >= d.at+int64(d.have) {
			d.at, d.have = here/directAlign*directAlign, 0
			n, err := d.f.ReadAt(d.buf, d.at)
			if d.have = n; n == 0 || d.at+int64(n) <= here {
				return done, orEOF(err)
			}
		}
		done += copy(p[done:], d.buf[here-d.at:d.have])
	}
	return done, nil
}

func orEOF(err error) error {
	if err != nil {
		return err
	}
	return io.EOF
}

// attr reads a number of /sys; -1 if there is none.
func attr(path string) int64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return -1
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// sectors reads a number of sectors, which have 512 bytes in /sys whatever the disk says, and returns bytes.
func sectors(path string) int64 { return attr(path) * gpt.SectorSize }

// media returns the names of block devices that may hold a bundle: disks and partitions of disks other than the system's, not in use.
func (l *Linux) media() ([]string, error) {
	k, err := l.kernel()
	if err != nil {
		return nil, err
	}
	system, _, err := l.find(k.root)
	if err != nil {
		return nil, err
	}
	all, err := os.ReadDir(filepath.Join(l.sys, "class/block"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range all {
		name := e.Name()
		path, err := filepath.EvalSymlinks(filepath.Join(l.sys, "class/block", name))
		if err != nil || name == system || filepath.Base(filepath.Dir(path)) == system ||
			slices.ContainsFunc(l.notMedia, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		if l.isBundle(name) == nil {
			out = append(out, filepath.Join(l.dev, name))
		}
	}
	return out, nil
}

// isBundle looks for the header of a tar with a manifest at a device's start.
func (l *Linux) isBundle(name string) error {
	f, err := os.Open(filepath.Join(l.dev, name))
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 512)
	if _, err := f.ReadAt(b, 0); err != nil {
		return err
	}
	if string(b[:len(bundle.ManifestName)+1]) != bundle.ManifestName+"\x00" || string(b[257:262]) != "ustar" {
		return bundle.ErrNotBundle
	}
	return nil
}
