package storaged

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// What file systems' tools may take and say.
const (
	mkfsTime   = 10 * time.Minute
	fsckTime   = 2 * time.Hour
	maxOutput  = 2 << 10 // bytes kept, the last ones
	toolsPath  = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
	noProfile  = "MKE2FS_CONFIG=/nonexistent" // mke2fs then uses what is compiled in, on every machine the same
	blockSize  = 4096
	bytesInode = 16384

	// groupBlocks is ext4's own choice. The second group starts with a copy of the superblock, which mend needs; a file system too small for
	// two such groups is given smaller ones.
	groupBlocks, smallGroup = 32768, 8192

	fsckCannot = 8 // exit code of e2fsck that found no superblock that it believes, among others
)

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - maxOutput; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// run runs a tool and returns its exit code; an error has what it said last.
func run(ctx context.Context, limit time.Duration, argv ...string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var out tail
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{toolsPath, noProfile, "LC_ALL=C"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return 0, nil
	}
	text := printable(strings.ReplaceAll(string(bytes.TrimSpace(out.b)), "\n", "; "))
	if ctx.Err() != nil {
		err = fmt.Errorf("%w after at most %s", ctx.Err(), limit)
	}
	return cmd.ProcessState.ExitCode(), fmt.Errorf("%s: %w: %s", argv[0], err, text)
}

// erase writes zeros over the first and the last mebibyte, where all signatures are.
func erase(f *os.File, size int64) error {
	zeros := make([]byte, min(mib, size))
	for _, off := range []int64{0, size - int64(len(zeros))} {
		if _, err := f.WriteAt(zeros, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// mkfs formats a volume that the table marks as unformatted, and only such a one, and then takes the mark away. Until the last
// moment a power cut leaves the mark, and everything is done again.
func (l *linux) mkfs(ctx context.Context, s Step) error {
	p, m, err := l.dataOf(s)
	if err != nil {
		return err
	}
	v := volumeNamed(s.Volume)
	if p.Attributes&unformatted == 0 {
		return nil // done
	}
	f, err := os.OpenFile(m.Device, os.O_RDWR|unix.O_EXCL, 0) // refused if it is in use
	if err != nil {
		return err
	}
	err = errors.Join(erase(f, m.Size), f.Close())
	if err != nil {
		return err
	}
	if _, err := run(ctx, mkfsTime, "mkfs.ext4", "-F", "-q", "-L", v.label, "-b", fmt.Sprint(blockSize), "-g", fmt.Sprint(groupOf(m.Size)), "-i", fmt.Sprint(bytesInode),
		"-m", fmt.Sprint(v.reserved), "-e", "remount-ro", "-O", "metadata_csum,64bit",
		"-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1", m.Device); err != nil {
		return err
	}
	if r, err := flushAndProbe(m.Device, m.Size); err != nil || r.Kind != probe.Ext4 || r.Label != v.label {
		return errors.Join(fmt.Errorf("found %s afterwards", r), err)
	}
	return l.table(s.Disk, func(_ *os.File, t *gpt.Table) error {
		for i := range t.Partitions {
			if t.Partitions[i] == p {
				t.Partitions[i].Attributes &^= unformatted | doomed
			}
		}
		return nil
	})
}

func flushAndProbe(device string, size int64) (probe.Result, error) {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return probe.Result{}, err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return probe.Result{}, err
	}
	return probe.Read(f, size)
}

// groupOf returns how many blocks a group of a new file system has.
func groupOf(size int64) int {
	if size < 2*groupBlocks*blockSize {
		return smallGroup
	}
	return groupBlocks
}

// Fsck repairs what can be repaired in an ext4 of ours without a person, and replays the journal. Exit codes are those of fsck(8): 1 is "errors corrected".
func Fsck(ctx context.Context, device string) error {
	code, err := run(ctx, fsckTime, "e2fsck", "-p", device)
	if code == fsckCannot {
		if merr := mend(device); merr != nil {
			err = fmt.Errorf("%w; %w", err, merr)
		} else {
			code, err = run(ctx, fsckTime, "e2fsck", "-p", device)
		}
	}
	if code == 0 || code == 1 {
		return nil
	}
	return fmt.Errorf("%w; it needs a person: e2fsck from a rescue system", err)
}

// mount mounts a volume that is whole. The journal is the kernel's business; only if the kernel says that the file system is damaged
// is it checked first.
func (l *linux) mount(ctx context.Context, s Step) error {
	p, m, err := l.dataOf(s)
	if err != nil {
		return err
	}
	v := volumeNamed(s.Volume)
	if p.Attributes&unformatted != 0 {
		return fmt.Errorf("%w (%s has no file system)", reconcile.ErrSkipped, s.on())
	}
	if fd, err := l.openVolume(v, m.Dev); err == nil {
		return unix.Close(fd) // done
	}
	content, err := probeDevice(m)
	if err != nil {
		return err
	}
	if content.Kind != probe.Ext4 || content.Label != v.label {
		return fmt.Errorf("found %s where the file system ext4 %q must be", content, v.label)
	}
	if content.Dirty { // what was locked until now could not be seen when this was planned
		if err := Fsck(ctx, m.Device); err != nil {
			return err
		}
	}
	flags := uintptr(0)
	for _, o := range strings.Split(v.options, ",") {
		flags |= map[string]uintptr{"nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC}[o]
	}
	target, data := filepath.Join(l.root, v.target), fmt.Sprintf("resuid=%d", v.owner)
	err = unix.Mount(m.Device, target, "ext4", flags, data)
	if errors.Is(err, unix.EUCLEAN) || errors.Is(err, unix.EFSBADCRC) {
		if err := Fsck(ctx, m.Device); err != nil {
			return err
		}
		err = unix.Mount(m.Device, target, "ext4", flags, data)
	}
	return err
}

// probeDevice looks at what lies on a device.
func probeDevice(m Map) (probe.Result, error) {
	f, err := os.Open(m.Device)
	if err != nil {
		return probe.Result{}, err
	}
	defer f.Close()
	return probe.Read(f, m.Size)
}

// openVolume opens a volume's top folder, if that device and no other is mounted there. The caller closes it at once: an open file
// would keep PID 1 from unmounting.
func (l *linux) openVolume(v volume, dev string) (int, error) {
	fd, err := unix.Open(filepath.Join(l.root, v.target), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", v.target, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || devText(st.Dev) != dev {
		unix.Close(fd)
		return -1, errors.Join(fmt.Errorf("%s is not mounted", v.target), err)
	}
	return fd, nil
}

// growFS makes a mounted file system as large as its partition.
func (l *linux) growFS(s Step) error {
	_, m, err := l.dataOf(s)
	if err != nil {
		return err
	}
	fd, err := l.openVolume(volumeNamed(s.Volume), m.Dev)
	if err != nil {
		return fmt.Errorf("%w (%w)", reconcile.ErrSkipped, err)
	}
	defer unix.Close(fd)
	return resizeExt4(fd, uint64(m.Size/blockSize))
}

// openBeneath opens a folder below another one, and never goes over a symbolic link or a mount: whoever is root in a pod can put
// one anywhere on VAR, and must not lead us elsewhere with it.
func openBeneath(root int, rel string) (int, error) {
	return unix.Openat2(root, rel, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// entry makes one entry, or gives a folder its owner and mode back.
func (l *linux) entry(s Step) error {
	e := s.Entry
	_, m, err := l.dataOf(s)
	if err != nil {
		return err
	}
	root, err := l.openVolume(volumeNamed(e.volume), m.Dev)
	if err != nil {
		return fmt.Errorf("%w (%w)", reconcile.ErrSkipped, err)
	}
	defer unix.Close(root)
	dir, err := openBeneath(root, path.Dir(e.path))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	base := path.Base(e.path)
	switch what, err := lookAt(root, e); {
	case err != nil:
		return err
	case what == good:
		return nil
	case what == another:
		return errors.New("something else is in its place")
	case what == skewed:
		fd, err := openBeneath(dir, base)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return own(fd, e)
	}
	if e.link != "" {
		return errors.Join(unix.Symlinkat(e.link, dir, base), unix.Fsync(dir))
	}
	return make1(dir, base, e)
}

// make1 makes a folder or marker under another name and renames it when it is as it must be: its owner waits for it to appear.
func make1(dir int, base string, e entry) error {
	next := ".new-" + strings.TrimPrefix(base, ".")
	var fd int
	var err error
	if e.marker {
		fd, err = unix.Openat(dir, next, unix.O_CREAT|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	} else {
		if err = unix.Mkdirat(dir, next, 0o700); err == nil || errors.Is(err, unix.EEXIST) {
			fd, err = openBeneath(dir, next)
		}
	}
	if err != nil {
		return err
	}
	err = errors.Join(own(fd, e), unix.Fsync(fd), unix.Close(fd))
	if err == nil {
		err = unix.Renameat2(dir, next, dir, base, unix.RENAME_NOREPLACE)
	}
	return errors.Join(err, unix.Fsync(dir))
}

// own gives a file its mode and owner. It takes the file over first, so that CAP_CHOWN is enough and CAP_FOWNER is not needed.
func own(fd int, e entry) error {
	if err := unix.Fchown(fd, os.Getuid(), os.Getgid()); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, bits(e.mode)); err != nil {
		return err
	}
	return unix.Fchown(fd, int(e.owner), int(e.owner))
}
