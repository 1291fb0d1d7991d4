package storaged

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/storaged/wipe"
)

// resetFile is there while the node is being reset, until it restarts: a storaged that was started anew must not make the volumes again.
const resetFile = "reset"

func (l *linux) held() bool {
	_, err := os.Lstat(filepath.Join(l.runtime, resetFile))
	return err == nil
}

// destroyed copies what is known of volumes that were destroyed.
func (l *linux) destroyed() map[VolumeName]wipe.How {
	out := map[VolumeName]wipe.How{}
	l.wiped.Range(func(v, how any) bool {
		out[v.(VolumeName)] = how.(wipe.How)
		return true
	})
	return out
}

// reset is Do for what ends the volumes.
func (l *linux) reset(s Step) error {
	switch s.Op {
	case opHold:
		return os.WriteFile(filepath.Join(l.runtime, resetFile), nil, 0o600)
	case opRelease:
		if err := os.Remove(filepath.Join(l.runtime, resetFile)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	case opDoom:
		return l.table(s.Disk, func(_ *os.File, t *gpt.Table) error { doom(t); return nil })
	case opLeave:
		return l.leave(s)
	case opDestroy:
		return l.destroy(s)
	case opDrop:
		return l.drop(s)
	case opRemoveOS:
		return l.removeOS(s)
	}
	return fmt.Errorf("unknown step %q", s.Op)
}

// leave lets a volume's file system write no more, unmounts it and closes the volume. Files on it may be open, and pods have mounts of it that nobody
// else sees; then it stays mounted or open until the machine is down, which is no harm: nothing reaches the disk any more.
func (l *linux) leave(s Step) error {
	_, k, err := l.inKernel(s)
	if err != nil {
		return err
	}
	v := volumeNamed(s.Volume)
	m, _ := l.mapOf(v, k.Device)
	for _, dev := range []string{m.Dev, k.Dev} {
		fd, err := l.openVolume(v, dev)
		if err != nil {
			continue // not mounted: below it may be PID 1's own mount, which stays
		}
		if err := errors.Join(unix.Syncfs(fd), shutdown(fd), unix.Close(fd)); err != nil {
			return err
		}
		if err := unix.Unmount(filepath.Join(l.root, v.target), 0); err != nil {
			l.log.Warn("the volume stays mounted until the machine is down", "disk", s.Device, "err", err.Error())
		}
	}
	if m.Device == "" {
		return nil
	}
	err = l.close(s.Volume)
	if errors.Is(err, unix.EBUSY) {
		l.log.Warn("the volume stays open until the machine is down", "disk", s.Device, "err", err.Error())
		return nil
	}
	return err
}

// inUse reports whether a file system or another device has a block device for itself, in whatever namespace.
func inUse(device string) bool {
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EBUSY)
}

// shutdown is the ioctl EXT4_IOC_SHUTDOWN (linux/fs/ext4/ext4.h) without a flush of the log: the file system does no I/O any more.
func shutdown(fs int) error {
	const ioctl = 0x8004587d // _IOR('X', 125, __u32)
	flags := uint32(2)       // EXT4_GOING_FLAGS_NOLOGFLUSH
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fs), ioctl, uintptr(unsafe.Pointer(&flags)))
	if errno != 0 {
		return fmt.Errorf("EXT4_IOC_SHUTDOWN: %w", errno)
	}
	return nil
}

// destroy wipes a volume that is marked for it.
func (l *linux) destroy(s Step) error {
	p, k, err := l.inKernel(s)
	if err != nil {
		return err
	}
	if !isDoomed(p) {
		return fmt.Errorf("%w (partition %d is not marked to be destroyed)", reconcile.ErrSkipped, s.Number)
	}
	how, err := wipe.Partition(k.Device, k.KernelSize)
	if err == nil {
		l.wiped.Store(s.Volume, how)
	}
	return err
}

// drop takes destroyed volumes out of the table, and then from the kernel, which keeps one that is in use until the machine restarts.
func (l *linux) drop(s Step) error {
	var gone []int
	if err := l.table(s.Disk, func(_ *os.File, t *gpt.Table) error { gone = drop(t); return nil }); err != nil {
		return err
	}
	f, err := os.OpenFile(s.Disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, n := range gone {
		if err := blkpg(f, unix.BLKPG_DEL_PARTITION, n, 0, 0); err != nil && !errors.Is(err, unix.ENXIO) {
			l.log.Warn("the kernel keeps the partition until the machine restarts", "disk", s.Disk, "err", err.Error())
		}
	}
	return nil
}

// oneBlock is how much of what runs is overwritten, in bytes: the block of the superblock, which nobody reads a second time. Behind it is what
// the last programs are made of.
const oneBlock = 4096

// removeOS takes the system off its disk: the firmware finds nothing to start, and there is no table that names a partition of ours. It begins with the
// EFI partition; from then on the machine does not start from this disk, whatever else is left.
func (l *linux) removeOS(s Step) error {
	l.tables.Lock()
	defer l.tables.Unlock()
	f, err := os.OpenFile(s.Disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		return err
	}
	forget(f)
	t, _, err := gpt.Read(f, n)
	if err != nil {
		return err
	}
	known := l.partitions(filepath.Base(s.Disk), nil)
	esp, ok := t.ByName("ESP")
	if ok {
		if err := l.unmake(esp, known, wipe.Mark); err != nil {
			return err
		}
	}
	if err := dropAll(f, n, t); err != nil {
		return err
	}
	for _, name := range []string{"ROOT-A", "ROOT-B", "VERITY-A", "VERITY-B"} { // the running one's tree after its root: each reads no more of the other then
		if p, ok := t.ByName(name); ok {
			if err := l.unmake(p, known, oneBlock); err != nil {
				return err
			}
		}
	}
	return nil
}

// unmake wipes a partition that nobody uses; of one that is in use it overwrites the start only.
func (l *linux) unmake(p gpt.Partition, known []Partition, start int64) error {
	for _, k := range known {
		if k.Number != p.Number || k.KernelStart != p.Start() || k.KernelSize != p.Size() {
			continue
		}
		if k.Busy {
			return wipe.Start(k.Device, min(start, k.KernelSize))
		}
		_, err := wipe.Partition(k.Device, k.KernelSize)
		return err
	}
	return fmt.Errorf("the kernel does not have partition %d (%s) in its place", p.Number, p.Name)
}

// dropAll takes all partitions of ours out of a table; if nobody else has one on the disk, the table goes too.
func dropAll(f *os.File, size int64, t gpt.Table) error {
	var others []gpt.Partition
	for _, p := range t.Partitions {
		if foreign(p) {
			others = append(others, p)
		}
	}
	if t.Partitions = others; len(others) > 0 {
		return t.WriteTo(f, size)
	}
	const length = gpt.FirstUsable * gpt.SectorSize // of the first copy, with the sector before it; the second is a sector shorter
	for _, at := range []int64{size - length + gpt.SectorSize, 0} {
		if _, err := f.WriteAt(make([]byte, min(length, size-at)), at); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}
