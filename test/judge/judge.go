// Package judge says what a node would make of a disk that a power cut has left: which version starts, and what configuration it finds. It
// looks as firmware, boot loader, kernel and daemons do, by their own code where that is ours, and by e2fsprogs where the kernel's ext4 would be.
//
// It is for tests: who asks knows the keys, and all that was ever put on the disk on purpose. It believes nothing else.
package judge

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/verity"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

// Disk is a rebuilt one: powercut's State.
type Disk interface {
	io.ReaderAt
	Size() int64
	// Sum is the same for equal contents of a range in whole blocks of powercut.BlockSize.
	Sum(from, length int64) uint64
	// Pages calls f for each page of the range that is not all zeros.
	Pages(from, length int64, f func(at int64, name uint64) error) error
}

// Found is what a node would find.
type Found struct {
	Version string // that starts
	Entry   string // the file of its kernel
	// Formatted is true if there is a STATE that counts; all below is zero if not.
	Formatted bool
	// Owner tells the authority apart whose credentials open the node; "" if nobody owns it.
	Owner string
	// Generation is that of the configuration, and Documents its text; 0 if there is none.
	Generation uint64
	Documents  string
	// Repaired is true if STATE's file system needed more than its journal.
	Repaired bool
}

// Judge remembers what it has looked at: equal pieces of disks are looked at once. It may be used by several goroutines.
type Judge struct {
	o       Options
	mu      sync.Mutex
	answers map[answerKey]*answer // guarded by mu
	slots   map[[32]byte]bool     // guarded by mu; keyslots with what belongs to them, as they were when they were whole
	plain   plain
}

// Options are what is known of a disk. All fields are required.
type Options struct {
	// Kernels are the kernel images that there may be, by SHA-256 in hexadecimal, with their versions.
	Kernels map[string]string
	// Loader is the SHA-256 of the boot loader, which firmware starts.
	Loader [sha256.Size]byte
	// Recovery are the recovery keys that there ever were, as they are typed.
	Recovery []string
	Folder   string // for what is written on the way
}

// New makes a judge.
func New(o Options) *Judge {
	return &Judge{o: o, answers: map[answerKey]*answer{}, slots: map[[32]byte]bool{}, plain: plain{pages: map[uint64][]byte{}}}
}

// An answerKey is a question about pieces of a disk.
type answerKey struct {
	what string
	sums [4]uint64
}

type answer struct {
	once  sync.Once
	value any
	err   error
}

// once answers a question that was answered before for the same pieces.
func once[T any](j *Judge, what string, sums [4]uint64, f func() (T, error)) (T, error) {
	key := answerKey{what, sums}
	j.mu.Lock()
	a := j.answers[key]
	if a == nil {
		a = new(answer)
		j.answers[key] = a
	}
	j.mu.Unlock()
	a.once.Do(func() { a.value, a.err = f() })
	v, _ := a.value.(T)
	return v, a.err
}

// Looked is how many different pieces were looked at.
func (j *Judge) Looked() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.answers)
}

// Look judges a disk. An error says why the node would not start, or what it has lost.
func (j *Judge) Look(d Disk) (Found, error) {
	table, err := once(j, "table", [4]uint64{d.Sum(0, powercut.BlockSize), d.Sum(d.Size()-powercut.BlockSize, powercut.BlockSize)}, func() (gpt.Table, error) {
		t, _, err := gpt.Read(d, d.Size()) // from the disk's start, or its end
		return t, err
	})
	if err != nil {
		return Found{}, err
	}
	start, err := j.boot(d, table)
	if err != nil {
		return Found{}, err
	}
	f, err := j.state(d, table)
	f.Version, f.Entry = start.version, start.entry
	return f, err
}

// A piece is a partition of a disk.
type piece struct {
	Disk
	from, length int64
}

func part(d Disk, t gpt.Table, name string) (piece, error) {
	p, ok := t.ByName(name)
	if !ok {
		return piece{}, fmt.Errorf("there is no partition %s", name)
	}
	return piece{d, p.Start(), p.Size()}, nil
}

func (p piece) sum() uint64 { return p.Sum(p.from, p.length) }

func (p piece) reader() *io.SectionReader { return io.NewSectionReader(p.Disk, p.from, p.length) }

// A readOnly piece is what package fat opens.
type readOnly struct{ *io.SectionReader }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, errors.New("nothing may be written") }
func (readOnly) Sync() error                        { return nil }

// A start is what the boot loader starts.
type start struct {
	version, entry string
	root           bundle.Digest
}

// boot does what firmware, systemd-boot and stage 1 do: the loader must be whole, and the kernel that it takes, and the root that the kernel takes.
func (j *Judge) boot(d Disk, t gpt.Table) (start, error) {
	esp, err := part(d, t, "ESP")
	if err != nil {
		return start{}, err
	}
	s, err := once(j, "esp", [4]uint64{esp.sum()}, func() (start, error) { return j.kernel(esp) })
	if err != nil {
		return start{}, fmt.Errorf("EFI partition: %w", err)
	}
	root, ok := t.ByGUID(gpt.GUID(s.root[:16]))
	tree, ok2 := t.ByGUID(gpt.GUID(s.root[16:]))
	if !ok || !ok2 {
		return start{}, fmt.Errorf("%s starts the root %s, which no slot has", s.entry, s.root)
	}
	data, hashes := piece{d, root.Start(), root.Size()}, piece{d, tree.Start(), tree.Size()}
	_, err = once(j, "root "+hex.EncodeToString(s.root[:]), [4]uint64{data.sum(), hashes.sum()}, func() (bool, error) {
		return true, verity.Verify(io.NewSectionReader(d, data.from, data.length), data.length, hashes.reader(), s.root)
	})
	if err != nil {
		return start{}, fmt.Errorf("%s starts the root in %s, which is not whole: %w", s.entry, root.Name, err)
	}
	return s, nil
}

// kernel finds what systemd-boot would start.
func (j *Judge) kernel(esp piece) (start, error) {
	v, err := fat.Open(readOnly{esp.reader()}, esp.length)
	if err != nil {
		return start{}, err
	}
	for _, name := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"} {
		b, err := readFile(v, name)
		if err != nil {
			return start{}, err
		}
		if sha256.Sum256(b) != j.o.Loader {
			return start{}, fmt.Errorf("%s is not the boot loader any more", name)
		}
	}
	const dir = "EFI/Linux"
	files, err := v.List(dir)
	if err != nil {
		return start{}, err
	}
	var names []string
	for _, f := range files {
		if filepath.Ext(f.Name) == ".efi" && !f.Dir {
			names = append(names, f.Name)
		}
	}
	if slots.Order(names); len(names) == 0 {
		return start{}, errors.New("there is nothing to start")
	}
	s := start{entry: names[0]}
	b, err := readFile(v, dir+"/"+s.entry)
	if err != nil {
		return start{}, err
	}
	known := false
	if s.version, known = j.o.Kernels[fmt.Sprintf("%x", sha256.Sum256(b))]; !known {
		return start{}, fmt.Errorf("%s is no kernel that was ever whole", s.entry)
	}
	s.root, err = rootHash(b)
	return s, err
}

func readFile(v *fat.Volume, path string) ([]byte, error) {
	f, err := v.Open(filepath.Dir(path), filepath.Base(path))
	if err != nil {
		return nil, err
	}
	b := make([]byte, f.Size)
	if n, err := f.ReadAt(b, 0); int64(n) < f.Size {
		return nil, fmt.Errorf("%s: %d of %d bytes: %w", path, n, f.Size, err)
	}
	return b, nil
}

// rootHash reads it from the command line of a kernel image.
func rootHash(image []byte) (bundle.Digest, error) {
	f, err := pe.NewFile(bytes.NewReader(image))
	if err != nil {
		return bundle.Digest{}, err
	}
	s := f.Section(".cmdline")
	if s == nil {
		return bundle.Digest{}, errors.New("the kernel has no command line")
	}
	line, err := s.Data()
	if err != nil {
		return bundle.Digest{}, err
	}
	for word := range strings.FieldsSeq(strings.TrimRight(string(line), "\x00")) {
		if v, ok := strings.CutPrefix(word, "bulkhead.verity="); ok {
			return bundle.ParseDigest(v)
		}
	}
	return bundle.Digest{}, errors.New("the kernel names no root")
}
