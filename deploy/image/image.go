// Package image makes the bootable image of a node: Debian's kernel and a few of its programs, our binaries, and the
// Kubernetes set become a read-only root with a dm-verity tree, a signed kernel image that knows its hash, and a disk with an
// EFI partition and two slots.
//
// What goes where is decided by pure functions that return a Tree, sections, or a partition table; writers carry it out. The
// same inputs give the same bytes. It needs no privilege: no mount, no loop device, no owner but the caller.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	_ "embed"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

//go:embed debian.lock
var lockText []byte

// Config says what to build from. Every field but Minimum, Append, ClaimKey, Programs and AllowMissing is required.
type Config struct {
	Bin          string   // folder of our binaries
	Kubernetes   string   // folder that deploy/build-kubernetes.sh made, or "none"
	Out          string   // folder of the image; it is replaced as a whole
	Version      string   // as in os-release: "1.2.3", "0.1.0-dev"; see bundle.ValidVersion
	Minimum      string   // the oldest version that may upgrade to this one; "" for any
	Epoch        int      // 1 to 63; a node that has seen a higher one opens its disk for this image no more
	Level        int      // of zstd, 1 to 22
	Append       string   // words at the end of the kernel command line, of printable ASCII; they may take protection away; for tests' images
	Keys         Keys     // to sign with
	ClaimKey     string   // file that becomes /usr/share/bulkhead/claim-key; "" for none
	Programs     []string // files that become programs in /usr/lib/bulkhead too, by their names: for tests' images
	AllowMissing bool     // build although some of our binaries do not exist
	Cache        debian.Cache
	Log          *slog.Logger
}

func (c Config) check() error {
	switch {
	case !bundle.ValidVersion(c.Version):
		return fmt.Errorf("version %q: want a version like 1.2.3 or 1.2.3-rc.1", c.Version)
	case c.Minimum != "" && !bundle.ValidVersion(c.Minimum):
		return fmt.Errorf("minimum %q: want a version like 1.2.3 or 1.2.3-rc.1", c.Minimum)
	case c.Epoch < 1 || c.Epoch > pcrpolicy.MaxEpoch:
		return fmt.Errorf("epoch %d: want 1 to %d", c.Epoch, pcrpolicy.MaxEpoch)
	case strings.ContainsFunc(c.Append, func(r rune) bool { return r < ' ' || r > '~' }):
		return fmt.Errorf("append %q: want printable ASCII on one line", c.Append)
	}
	return c.Keys.check()
}

// Lock returns the lock that is compiled in.
func Lock() (debian.Lock, error) {
	l, err := debian.ParseLock(lockText)
	if err != nil {
		return l, fmt.Errorf("debian.lock: %w", err)
	}
	return l, nil
}

// RefreshLock returns a lock of the newest versions, all of which it fetches.
func RefreshLock(ctx context.Context, cache debian.Cache) (debian.Lock, error) {
	l, err := cache.Resolve(ctx, suite, packages)
	if err != nil {
		return l, err
	}
	files, err := cache.Read(ctx, l, wanted)
	if err != nil {
		return l, err
	}
	k, err := readKernel(ctx, files)
	if err != nil {
		return l, err
	}
	_, err = rootTree(inputs{version: "0", debian: files, release: k.release, early: k.early, late: k.late})
	return l, err
}

// Build makes the image, unless it is there already and made of the same. It returns its manifest, and whether it
// did anything. Two builds for the same folder wait for each other.
func Build(ctx context.Context, cfg Config) (m Manifest, built bool, err error) {
	if err := cfg.check(); err != nil {
		return m, false, err
	}
	unlock, err := lockFolder(cfg.Out)
	if err != nil {
		return m, false, err
	}
	defer unlock()
	src, err := gather(cfg)
	if err != nil {
		return m, false, err
	}
	st, err := src.stamp(cfg)
	if err != nil {
		return m, false, err
	}
	if old, err := ReadManifest(cfg.Out); err == nil && readStamp(cfg.Out).Digest == st.Digest && complete(cfg.Out, old) {
		return old, false, st.write(cfg.Out)
	}
	tmp := cfg.Out + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return m, false, err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return m, false, err
	}
	defer os.RemoveAll(tmp)
	if m, err = build(ctx, cfg, src, tmp); err != nil {
		return m, false, err
	}
	if err := st.write(tmp); err != nil {
		return m, false, err
	}
	return m, true, replace(cfg.Out, tmp)
}

// replace puts the folder tmp in the place of out.
func replace(out, tmp string) error {
	old := out + ".old"
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if err := os.Rename(out, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, out); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

func lockFolder(out string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(out+".lock", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}
