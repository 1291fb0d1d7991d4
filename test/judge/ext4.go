package judge

import (
	"bytes"
	"context"
	"crypto/aes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/crypto/xts"

	"github.com/bulkhead-os/bulkhead/services/machined/store"
	"github.com/bulkhead-os/bulkhead/storaged"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

const (
	pageSize = 4096
	// plainMax is how many decrypted pages are remembered: 256 MiB.
	plainMax = 64 << 10
)

// plain remembers decrypted pages by the names of the encrypted ones.
type plain struct {
	mu    sync.Mutex
	pages map[uint64][]byte // guarded by mu
}

// decrypt writes what a volume's data are to a new file, with holes where nothing was ever written.
func (j *Judge) decrypt(v volume, from, length int64, file string) (err error) {
	s := v.header.Segment
	if s.SectorSize != pageSize || from%pageSize != 0 {
		return fmt.Errorf("sectors of %d bytes at %d: this judge knows 4096 at whole pages only", s.SectorSize, from)
	}
	c, err := xts.NewCipher(aes.NewCipher, v.key.Expose())
	if err != nil {
		return err
	}
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := out.Truncate(length); err != nil {
		return err
	}
	var run []byte
	start := int64(0)
	flush := func() error {
		_, err := out.WriteAt(run, start)
		run = run[:0]
		return err
	}
	err = v.Pages(from, length, func(at int64, name uint64) error {
		j.plain.mu.Lock()
		b, ok := j.plain.pages[name]
		j.plain.mu.Unlock()
		if !ok {
			b = make([]byte, pageSize)
			if _, err := v.ReadAt(b, at); err != nil {
				return err
			}
			c.Decrypt(b, b, uint64(at-from)/512+s.IVTweak) // dm-crypt counts in 512 bytes, whatever its sectors are
			j.plain.mu.Lock()
			if len(j.plain.pages) >= plainMax {
				clear(j.plain.pages)
			}
			j.plain.pages[name] = b
			j.plain.mu.Unlock()
		}
		if at-from != start+int64(len(run)) {
			if err := flush(); err != nil {
				return err
			}
			start = at - from
		}
		run = append(run, b...)
		return nil
	})
	return errors.Join(err, flush())
}

// tool runs a program of e2fsprogs and returns its exit code and what it said.
func tool(argv ...string) (int, string, error) {
	path := argv[0]
	for _, name := range []string{argv[0], "/usr/sbin/" + argv[0], "/sbin/" + argv[0]} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	cmd := exec.Command(path, argv[1:]...)
	cmd.Env = []string{"LC_ALL=C"}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode(), string(bytes.TrimSpace(out)), nil
	}
	return 0, string(bytes.TrimSpace(out)), err
}

// mountable does to a file system what storaged and the kernel do before it is mounted (storaged/volume.go): replay the journal, and repair only what a
// machine may repair alone. It returns whether there was something to repair.
func mountable(image string) (repaired bool, err error) {
	f, err := os.Open(image)
	if err != nil {
		return false, err
	}
	fi, err := f.Stat()
	if err != nil {
		return false, errors.Join(err, f.Close())
	}
	found, err := probe.Read(f, fi.Size())
	if err = errors.Join(err, f.Close()); err != nil {
		return false, err
	}
	if found.Kind != probe.Ext4 || found.Label != stateLabel {
		return false, fmt.Errorf("found %s where the file system ext4 %q must be", found, stateLabel)
	}
	if !found.Dirty {
		if code, _, err := tool("e2fsck", "-p", "-E", "journal_only", image); err != nil || code <= 1 {
			return false, err
		}
	}
	return true, storaged.Fsck(context.Background(), image)
}

// sound looks through a whole file system. The kernel would not, but nothing must be there that a machine may not repair alone.
func sound(image string) error {
	code, text, err := tool("e2fsck", "-fp", image)
	if err == nil && code > 1 {
		err = fmt.Errorf("the journal leaves a damaged file system: e2fsck ends with %d: %s", code, text)
	}
	return err
}

// dump copies from a file system what counts on STATE.
func dump(image, dir string) error {
	for _, folder := range []string{"trustd", "storaged", "updated"} {
		if _, _, err := tool("debugfs", "-R", fmt.Sprintf("rdump /%s %q", folder, dir), image); err != nil {
			return err
		}
	}
	to := filepath.Join(dir, "machined")
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	_, _, err := tool("debugfs", "-R", fmt.Sprintf("rdump /machined/generations %q", to), image)
	return err
}

// newest returns what machined would take; 0 if there is none. A generation that is not whole is an error: machined never leaves one.
func newest(machined string) (number uint64, documents string, err error) {
	folder, err := store.OpenFolder(machined, "generations")
	if err != nil {
		return 0, "", err
	}
	defer folder.Close()
	s, err := store.Open(folder)
	if err != nil {
		return 0, "", err
	}
	g, damaged := s.Newest()
	return g.Number, string(g.Documents), errors.Join(damaged...)
}
