package storaged

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/kobject"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// linux is the kernel layer. Its fields are the node's own places, except in tests.
type linux struct {
	sys, dev, proc string
	root           string // before the targets of volumes; "" on a node
	include        func(name string) bool
	rootDev        func() string // device number of the root file system, "254:0"
	log            *slog.Logger
	runtime        string // folder that lives as long as the machine runs
	vault          *vault.Vault

	vars   string                   // the firmware's variables
	loader func() (gpt.GUID, error) // the EFI partition that the machine was started from

	news     func(Progress) // is called about once a second while something is copied; may be nil
	mu       sync.Mutex
	progress Progress // guarded by mu; of the installation

	wiped  sync.Map     // VolumeName to wipe.How, of volumes that were destroyed since the start of this process
	looks  sync.RWMutex // held for reading while devices are looked at: one that is being looked at cannot be closed
	tables sync.Mutex   // held while a partition table is read, changed and written: slots are labelled beside the loop
}

func newLinux(log *slog.Logger, v *vault.Vault) *linux {
	l := &linux{sys: "/sys", dev: "/dev", proc: "/proc", vars: "/sys/firmware/efi/efivars", runtime: runtimeFolder, vault: v, include: isDisk, log: log, rootDev: func() string {
		var st unix.Stat_t
		if unix.Stat("/", &st) != nil {
			return ""
		}
		return devText(st.Dev)
	}}
	l.loader = sync.OnceValues(l.bootESP) // it does not change while the machine runs
	return l
}

func devText(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// Read looks at everything. It changes nothing but the word for trustd, and may be called by several goroutines.
func (l *linux) Read(context.Context) (State, error) {
	l.looks.RLock()
	defer l.looks.RUnlock()
	s := State{Volumes: map[VolumeName]Space{}, Entries: map[VolumeName]map[string]found{}, TPM: l.vault.Machine(), Reset: l.held(), Wiped: l.destroyed()}
	var err error
	if s.Mounts, err = l.mounts(); err != nil {
		return State{}, err
	}
	if s.Disks, err = l.disks(s.Mounts); err != nil {
		return State{}, err
	}
	s.Install = l.installation(s.Disks)
	for _, v := range volumes {
		for _, d := range s.Disks {
			p, ok := d.volume(v)
			if !ok || !s.isMounted(v, p) {
				continue
			}
			if s.Entries[v.name], s.Volumes[v.name], err = l.inspect(v, p.data().Dev); err != nil {
				return State{}, err
			}
		}
	}
	return s, l.tellLocked(s)
}

// Watch wakes the loop when the kernel says that a block device came, went or changed. Events are never more than that: the loop
// looks at everything by itself too, so without them (an old kernel, a lost event) things merely take longer.
//
// The kernel sends them to the network namespaces that the first user namespace owns, so also to the empty one in which storaged runs.
//
// A volume that has become full, or has room again, wakes it too.
func (l *linux) Watch(ctx context.Context, wake func()) error {
	var room sync.WaitGroup
	room.Go(func() { l.watchRoom(ctx, wake) })
	defer room.Wait()
	client, err := kobject.New()
	if err != nil {
		l.log.Warn("no device events; looking from time to time only", "err", err.Error())
		<-ctx.Done()
		return ctx.Err()
	}
	stop := context.AfterFunc(ctx, func() { _ = client.Close() }) // ends Receive
	defer stop()
	for {
		e, err := client.Receive()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case errors.Is(err, unix.ENOBUFS): // events were lost: any may have been ours
			wake()
		case errors.Is(err, os.ErrClosed), errors.Is(err, unix.EBADF):
			return fmt.Errorf("device events: %w", err)
		case err == nil && e.Subsystem == "block":
			wake()
		}
	}
}

// roomPause is between two looks at the room on volumes, which no event tells: so long may a node say that it is well while nothing can be written.
const roomPause = 5 * time.Second

func (l *linux) watchRoom(ctx context.Context, wake func()) {
	full := map[VolumeName]bool{}
	tick := time.NewTicker(roomPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, v := range volumes {
			var st unix.Statfs_t
			if unix.Statfs(filepath.Join(l.root, v.target), &st) != nil {
				continue // the loop tells what is wrong
			}
			if now := spaceOf(st).full(); now != full[v.name] {
				full[v.name] = now
				wake()
			}
		}
	}
}

// Do does one step. Every step looks again at what it is about to change: between plan and deed a disk may have been exchanged.
func (l *linux) Do(ctx context.Context, s Step) error {
	switch s.Op {
	case opCreate:
		return l.create(s)
	case opRemove:
		return l.remove(s)
	case opRepair:
		return l.table(s.Disk, func(*os.File, *gpt.Table) error { return nil })
	case opAdd:
		return l.table(s.Disk, func(f *os.File, t *gpt.Table) error { return addVolume(f, t, s) })
	case opGrow:
		return l.table(s.Disk, func(_ *os.File, t *gpt.Table) error { return growVolume(t, s) })
	case opTell:
		return l.tell(s)
	case opLay:
		return l.lay(s)
	case opRoot:
		return l.installRoot(ctx, s)
	case opBoot:
		return l.installBoot(ctx, s)
	case opDone:
		return l.mark(s.Disk, layout.ESP, gpt.GUID{}, gpt.GUID{})
	case opMkfs:
		return l.mkfs(ctx, s)
	case opFsck:
		_, m, err := l.dataOf(s)
		if err != nil {
			return err
		}
		return Fsck(ctx, m.Device)
	case opMount:
		return l.mount(ctx, s)
	case opGrowFS:
		return l.growFS(s)
	case opEntry:
		return l.entry(s)
	case opHold, opRelease, opDoom, opLeave, opDestroy, opDrop, opRemoveOS:
		return l.reset(s)
	}
	return l.locks(ctx, s)
}

// size returns the length in bytes of a block device or, in tests, of a file.
func size(f *os.File) (int64, error) { return f.Seek(0, io.SeekEnd) }

// table reads a disk's table, lets change alter it, and writes it in the order that survives a power cut.
func (l *linux) table(disk string, change func(*os.File, *gpt.Table) error) error {
	l.tables.Lock()
	defer l.tables.Unlock()
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		return err
	}
	forget(f)
	t, health, err := gpt.Read(f, n)
	if err != nil {
		return err
	}
	before := slices.Clone(t.Partitions)
	if err := change(f, &t); err != nil {
		return err
	}
	if health.OK() && slices.Equal(before, t.Partitions) {
		return nil
	}
	if err := wipeStale(f, t, health); err != nil {
		return err
	}
	return t.WriteTo(f, n)
}

// wipeStale removes the backup copy from where the disk once ended, while the primary still tells where that is: afterwards it
// would look like somebody's data.
func wipeStale(f *os.File, t gpt.Table, h gpt.Health) error {
	at := staleCopy(h)
	for _, p := range t.Partitions {
		if p.Start() < at.end && at.start < p.Start()+p.Size() {
			return nil
		}
	}
	if at.start >= at.end {
		return nil
	}
	if _, err := f.WriteAt(make([]byte, at.end-at.start), at.start); err != nil {
		return err
	}
	return f.Sync()
}

func newGUID() (g gpt.GUID) {
	_, _ = rand.Read(g[:])  // never fails
	g[6] = g[6]&0x0f | 0x40 // version 4
	g[8] = g[8]&0x3f | 0x80 // of RFC 9562
	return g
}

// addVolume adds a volume marked as unformatted; what lies there must be nothing unless foreign data may be lost.
func addVolume(f *os.File, t *gpt.Table, s Step) error {
	v := volumeNamed(s.Volume)
	for _, p := range t.Partitions {
		if v.owns(p) {
			if p.Number == s.Number && p.Start() == s.Start {
				return nil
			}
			return fmt.Errorf("%s is partition %d already", v.name, p.Number)
		}
	}
	r, err := probe.Read(io.NewSectionReader(f, s.Start, s.Size), s.Size)
	if err != nil {
		return err
	}
	if r.Data() && !s.Wipe {
		return fmt.Errorf("found %s at %s of the disk, in the free space, which would be lost; set Storage.wipe to true to allow that", r, sizeText(s.Start))
	}
	t.Partitions = append(t.Partitions, gpt.Partition{
		Number: s.Number, Type: v.typ, GUID: newGUID(), Name: string(v.name), Attributes: unformatted,
		First: uint64(s.Start / gpt.SectorSize), Last: uint64((s.Start+s.Size)/gpt.SectorSize) - 1,
	})
	slices.SortFunc(t.Partitions, func(a, b gpt.Partition) int { return a.Number - b.Number })
	return nil // WriteTo refuses a table whose partitions overlap
}

func growVolume(t *gpt.Table, s Step) error {
	v := volumeNamed(s.Volume)
	for i, p := range t.Partitions {
		if v.owns(p) && p.Number == s.Number && p.Start() == s.Start {
			t.Partitions[i].Last = max(p.Last, uint64((s.Start+s.Size)/gpt.SectorSize)-1)
			return nil
		}
	}
	return fmt.Errorf("partition %d is not %s any more", s.Number, v.name)
}

// create writes an empty table to a disk that holds nothing, or foreign data that may be lost.
func (l *linux) create(s Step) error {
	name := filepath.Base(s.Disk)
	f, err := os.OpenFile(s.Disk, os.O_RDWR|unix.O_EXCL, 0) // refused while the disk or a partition of it is in use
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		return err
	}
	d := Disk{Device: s.Disk, Size: n}
	if err := d.read(f, nil); err != nil {
		return err
	}
	switch {
	case d.HasTable && len(d.Partitions) == 0:
		return nil
	case d.HasTable || d.TableError != "":
		return errors.New("there is a partition table meanwhile")
	case d.Content.Data() && !(s.Wipe && s.Over == d.Content.String()):
		return fmt.Errorf("holds %s, which would be lost; set Storage.wipe to true to allow that", d.Content)
	}
	for _, p := range l.partitions(name, nil) { // of an MBR
		if err := blkpg(f, unix.BLKPG_DEL_PARTITION, p.Number, 0, 0); err != nil {
			return fmt.Errorf("partition %d: %w", p.Number, err)
		}
	}
	if err := erase(f, n); err != nil {
		return err
	}
	return gpt.Table{DiskGUID: newGUID()}.WriteTo(f, n)
}

// remove takes out a foreign partition: first from the kernel, which refuses if it is in use.
func (l *linux) remove(s Step) error {
	return l.table(s.Disk, func(f *os.File, t *gpt.Table) error {
		i := slices.IndexFunc(t.Partitions, func(p gpt.Partition) bool { return p.Number == s.Number })
		if i < 0 {
			return nil
		}
		if p := t.Partitions[i]; !s.Wipe || !foreign(p) || p.Start() != s.Start || p.Size() != s.Size {
			return fmt.Errorf("partition %d (%q) is another one meanwhile", p.Number, p.Name)
		}
		if err := blkpg(f, unix.BLKPG_DEL_PARTITION, s.Number, 0, 0); err != nil && !errors.Is(err, unix.ENXIO) {
			return err
		}
		t.Partitions = slices.Delete(t.Partitions, i, i+1)
		return nil
	})
}

// tell makes the kernel's idea of a partition that of the table. BLKRRPART would not do: it fails while any partition is in use.
func (l *linux) tell(s Step) error {
	if _, err := l.inTable(s); err != nil {
		return err
	}
	return l.tellKernel(s.Disk, s.Number, s.Start, s.Size)
}

func (l *linux) tellKernel(disk string, number int, start, size int64) error {
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, k := range l.partitions(filepath.Base(disk), nil) {
		switch {
		case k.Number != number:
		case k.KernelStart != start || k.KernelSize > size:
			return fmt.Errorf("the kernel has it at byte %d, %s long; restart the machine", k.KernelStart, sizeText(k.KernelSize))
		case k.KernelSize == size:
			return nil
		default:
			return blkpg(f, unix.BLKPG_RESIZE_PARTITION, number, start, size)
		}
	}
	return blkpg(f, unix.BLKPG_ADD_PARTITION, number, start, size)
}

// inTable returns the entry of the table for the step's volume. If there is none as planned, an earlier step has failed.
func (l *linux) inTable(s Step) (gpt.Partition, error) {
	f, err := os.Open(s.Disk)
	if err != nil {
		return gpt.Partition{}, err
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		return gpt.Partition{}, err
	}
	t, _, err := gpt.Read(f, n)
	if err != nil {
		return gpt.Partition{}, fmt.Errorf("%w (%w)", reconcile.ErrSkipped, err)
	}
	for _, p := range t.Partitions {
		if volumeNamed(s.Volume).owns(p) && p.Number == s.Number && p.Start() == s.Start && p.Size() == s.Size {
			return p, nil
		}
	}
	return gpt.Partition{}, fmt.Errorf("%w (no partition %d %s of %s on %s)", reconcile.ErrSkipped, s.Number, s.Volume, sizeText(s.Size), s.Disk)
}

// inKernel returns the same, if the kernel has the partition in just this place too.
func (l *linux) inKernel(s Step) (gpt.Partition, Partition, error) {
	p, err := l.inTable(s)
	if err != nil {
		return p, Partition{}, err
	}
	for _, k := range l.partitions(filepath.Base(s.Disk), nil) {
		if k.Number == s.Number && k.KernelStart == s.Start && k.KernelSize == s.Size && k.Device == s.Device {
			return p, k, nil
		}
	}
	return p, Partition{}, fmt.Errorf("%w (the kernel does not have %s in its place)", reconcile.ErrSkipped, s.Device)
}
