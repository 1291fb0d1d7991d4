package storaged

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// maxText bounds what is read from one file of /sys, maxMountInfo the table of mounts; in bytes.
const (
	maxText      = 256
	maxMountInfo = 4 << 20
)

// notDisks are the names of block devices that never carry volumes: made by others out of disks, or removable media.
var notDisks = []string{"loop", "ram", "zram", "dm-", "sr", "fd", "nbd", "mtdblock"}

func isDisk(name string) bool {
	for _, p := range notDisks {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	return true
}

// block returns the folder of a block device in /sys.
func (l *linux) block(name string) string { return filepath.Join(l.sys, "class/block", name) }

// attr reads one short text, made printable; "" if there is none.
func attr(path ...string) string {
	f, err := os.Open(filepath.Join(path...))
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxText))
	if err != nil {
		return ""
	}
	return printable(string(b))
}

// printable is for what a device says of itself, which may be anything.
func printable(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s))
}

func number(path ...string) int64 {
	n, _ := strconv.ParseInt(attr(path...), 10, 64)
	return n
}

// disks reads all disks and what is on them.
func (l *linux) disks(mounts []Mount) ([]Disk, error) {
	all, err := os.ReadDir(l.block(""))
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, m := range mounts {
		used[m.Dev] = true
	}
	var out []Disk
	for _, e := range all {
		name := e.Name()
		_, err := os.Stat(filepath.Join(l.block(name), "partition"))
		if err == nil || !l.include(name) || number(l.block(name), "size") == 0 || attr(l.block(name), "hidden") == "1" {
			continue
		}
		out = append(out, l.disk(name, used))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Device < out[j].Device })
	l.markSystem(out)
	return out, nil
}

func (l *linux) disk(name string, used map[string]bool) Disk {
	at := l.block(name)
	d := Disk{
		Device:     filepath.Join(l.dev, name),
		Size:       number(at, "size") * 512, // always in units of 512 bytes
		SectorSize: int(number(at, "queue/logical_block_size")),
		Transport:  l.transport(at),
		Model:      attr(at, "device/model"),
		Serial:     serial(at),
		WWN:        cmp.Or(attr(at, "wwid"), attr(at, "device/wwid")),
		Removable:  attr(at, "removable") == "1",
		ReadOnly:   attr(at, "ro") == "1",
		Rotational: attr(at, "queue/rotational") == "1",
		Busy:       used[attr(at, "dev")] || held(at),
	}
	kernel := l.partitions(name, used)
	f, err := os.Open(d.Device)
	if err == nil {
		defer f.Close()
		forget(f)
		err = d.read(f, kernel)
	}
	if err != nil {
		d.Unreadable, d.HasTable, d.Partitions = err.Error(), false, kernel
	}
	for i := range d.Partitions {
		l.probe(&d.Partitions[i])
		l.crypt(&d.Partitions[i])
	}
	return d
}

// read fills in what the disk itself says; kernel has the partitions that the kernel knows.
func (d *Disk) read(r io.ReaderAt, kernel []Partition) error {
	var err error
	if d.Content, err = probe.Read(r, d.Size); err != nil {
		return err
	}
	d.Partitions = kernel
	if d.Content.Kind != probe.GPT { // a backup copy that a file system has left does not make it a GPT
		return nil
	}
	t, health, err := gpt.Read(r, d.Size)
	if err != nil {
		d.TableError = err.Error()
		return nil
	}
	d.HasTable, d.GUID, d.Partitions = true, t.DiskGUID, nil
	if err := errors.Join(health.Primary, health.Backup); err != nil {
		d.Repair = err.Error()
	}
	for _, p := range t.Partitions {
		q := Partition{Partition: p}
		for _, k := range kernel {
			if k.Number == p.Number {
				q = k
				q.Partition = p
			}
		}
		d.Partitions = append(d.Partitions, q)
	}
	if start, room := free(t, d.Size); room > 0 {
		d.Tail, err = probe.Read(io.NewSectionReader(hidden{r, staleCopy(health)}, start, room), room)
	}
	return err
}

// extent is a range of bytes of a disk.
type extent struct{ start, end int64 }

// staleCopy is where the table's backup copy lay before the disk grew; the zero value if it did not.
func staleCopy(h gpt.Health) extent {
	if h.Stale <= gpt.FirstUsable {
		return extent{}
	}
	return extent{int64(h.Stale-gpt.EntrySectors) * gpt.SectorSize, int64(h.Stale+1) * gpt.SectorSize}
}

// hidden reads zeros in an extent that is known to be nobody's data.
type hidden struct {
	io.ReaderAt
	hole extent
}

func (h hidden) ReadAt(p []byte, at int64) (int, error) {
	n, err := h.ReaderAt.ReadAt(p, at)
	if from, to := max(h.hole.start, at), min(h.hole.end, at+int64(n)); from < to {
		clear(p[from-at : to-at])
	}
	return n, err
}

// partitions returns those that the kernel knows.
func (l *linux) partitions(disk string, used map[string]bool) []Partition {
	all, _ := os.ReadDir(l.block(disk)) // gone meanwhile: none
	var out []Partition
	for _, e := range all {
		at := filepath.Join(l.block(disk), e.Name())
		n := number(at, "partition")
		if n < 1 {
			continue
		}
		p := Partition{
			Device: filepath.Join(l.dev, e.Name()), Dev: attr(at, "dev"),
			KernelStart: number(at, "start") * 512, KernelSize: number(at, "size") * 512,
		}
		p.Number, p.First = int(n), uint64(p.KernelStart/512)
		p.Last = p.First + uint64(max(p.KernelSize/512, 1)) - 1
		p.Busy = used[p.Dev] || held(at)
		out = append(out, p)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Number < out[j].Number })
	return out
}

// probe looks at a partition through its own node: the whole disk's cache knows nothing of what was written there.
func (l *linux) probe(p *Partition) {
	if p.Device == "" || p.KernelSize == 0 {
		return
	}
	f, err := os.Open(p.Device)
	if err != nil {
		return // stays Unread, which counts as data
	}
	defer f.Close()
	p.Content, _ = probe.Read(f, p.KernelSize)
}

// held reports whether a block device is part of another one.
func held(at string) bool {
	all, _ := os.ReadDir(filepath.Join(at, "holders"))
	return len(all) > 0
}

// forget drops what the kernel has cached of a disk: it may have been read before a partition was written through its own node.
func forget(f *os.File) {
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // advice: no harm if refused
}

// transport is read from the device's place in the tree of buses.
func (l *linux) transport(at string) string {
	path, err := filepath.EvalSymlinks(at)
	if err != nil {
		return ""
	}
	for _, t := range []struct{ part, name string }{
		{"/virtio", "virtio"}, {"/nvme", "nvme"}, {"/usb", "usb"}, {"/ata", "sata"}, {"/mmc", "mmc"}, {"/vbd-", "xen"},
		{"/target", "scsi"}, {"/virtual/", "virtual"},
	} {
		if strings.Contains(path, t.part) {
			return t.name
		}
	}
	return "other"
}

func serial(at string) string {
	for _, p := range []string{"serial", "device/serial", "device/vpd_pg80"} { // virtio; nvme, mmc; scsi, behind 4 bytes
		if s := attr(at, p); s != "" {
			return s
		}
	}
	return ""
}

// markSystem marks the disk under the root file system; if that lies on no block device, the one that holds the partition whose GUID
// the kernel's command line tells.
func (l *linux) markSystem(disks []Disk) {
	name := l.under(l.rootDev(), 0)
	guid := rootGUID(attrLong(filepath.Join(l.proc, "cmdline")))
	for i := range disks {
		if name != "" {
			disks[i].System = filepath.Base(disks[i].Device) == name
		} else if _, ok := disks[i].table().ByGUID(guid); ok && disks[i].HasTable && guid != (gpt.GUID{}) {
			disks[i].System = true
			return // a clone of the disk would be found too: one is enough to be wrong about
		}
	}
}

// under returns the name of the disk below a device number, through device-mapper and partitions; "" if there is none.
func (l *linux) under(dev string, depth int) string {
	path, err := filepath.EvalSymlinks(filepath.Join(l.sys, "dev/block", dev))
	if err != nil || dev == "" || depth > 8 {
		return ""
	}
	if slaves, _ := os.ReadDir(filepath.Join(path, "slaves")); len(slaves) > 0 {
		return l.under(attr(path, "slaves", slaves[0].Name(), "dev"), depth+1)
	}
	if _, err := os.Stat(filepath.Join(path, "partition")); err == nil {
		path = filepath.Dir(path)
	}
	return filepath.Base(path)
}

func attrLong(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	return string(b)
}

// rootGUID is the unique GUID of the root partition: the first half of the root hash (docs/node.md). Zero if there is none.
func rootGUID(cmdline string) gpt.GUID {
	for _, w := range strings.Fields(cmdline) {
		hash, ok := strings.CutPrefix(w, "bulkhead.verity=")
		if !ok || len(hash) < 32 {
			continue
		}
		h := hash[:32]
		if g, err := gpt.ParseGUID(h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]); err == nil {
			return g
		}
	}
	return gpt.GUID{}
}

// mounts returns what lies on block devices, targets without l.root.
func (l *linux) mounts() ([]Mount, error) {
	path := filepath.Join(l.proc, "thread-self/mountinfo")
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMountInfo))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	all := parseMounts(string(b), l.root)
	for i, m := range all { // btrfs has device numbers of its own
		if st := (unix.Stat_t{}); strings.HasPrefix(m.Dev, "0:") && unix.Stat(m.Source, &st) == nil {
			all[i].Dev = devText(uint64(st.Rdev))
		}
	}
	return all, nil
}

// parseMounts reads proc_pid_mountinfo(5); lines that are not as it says are skipped.
func parseMounts(text, root string) (out []Mount) {
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 2 || (strings.HasPrefix(l[2], "0:") && !strings.HasPrefix(r[1], "/dev/")) {
			continue
		}
		target := unescape(l[4])
		if below, ok := strings.CutPrefix(target, root); ok && root != "" {
			target = below
		}
		out = append(out, Mount{Source: unescape(r[1]), Target: target, Filesystem: r[0], Options: l[5], Dev: l[2]})
	}
	return out
}

// unescape undoes the octal escapes of blanks and backslashes.
func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

// inspect compares a mounted volume with its entries. dev is the device number that must be mounted there.
func (l *linux) inspect(v volume, dev string) (map[string]found, Space, error) {
	root, err := l.openVolume(v, dev)
	if err != nil {
		return nil, Space{}, err
	}
	defer unix.Close(root)
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err != nil {
		return nil, Space{}, fmt.Errorf("statfs %s: %w", v.target, err)
	}
	seen := map[string]found{}
	for _, e := range entries {
		if e.volume != v.name {
			continue
		}
		if seen[e.path], err = lookAt(root, e); err != nil {
			return nil, Space{}, fmt.Errorf("%s/%s: %w", v.target, e.path, err)
		}
	}
	return seen, spaceOf(st), nil
}

func spaceOf(st unix.Statfs_t) Space {
	return Space{Size: int64(st.Blocks) * st.Frsize, Free: int64(st.Bavail) * st.Frsize}
}

// lookAt compares one entry. Pods run as root may have put anything in its place.
func lookAt(root int, e entry) (found, error) {
	dir, err := openBeneath(root, filepath.Dir(e.path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return absent, nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return another, nil
	case errors.Is(err, unix.EXDEV): // somebody mounted something over it: theirs
		return good, nil
	case err != nil:
		return absent, err
	}
	defer unix.Close(dir)
	base := filepath.Base(e.path)
	var vol, st unix.Stat_t
	if err := unix.Fstat(root, &vol); err != nil {
		return absent, err
	}
	err = unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return absent, nil
	case err != nil:
		return absent, err
	case st.Dev != vol.Dev:
		return good, nil
	}
	kind := st.Mode & unix.S_IFMT
	switch {
	case e.link != "":
		b := make([]byte, len(e.link)+1)
		n, err := unix.Readlinkat(dir, base, b)
		if kind == unix.S_IFLNK && err == nil && string(b[:n]) == e.link {
			return good, nil
		}
		return another, nil
	case e.marker:
		if kind == unix.S_IFREG {
			return good, nil
		}
		return another, nil
	case kind != unix.S_IFDIR:
		return another, nil
	case e.exact() && (st.Uid != uint32(e.owner) || st.Gid != uint32(e.owner) || st.Mode&0o7777 != bits(e.mode)):
		return skewed, nil
	}
	return good, nil
}

// bits is a mode as chmod(2) takes it.
func bits(m fs.FileMode) uint32 {
	b := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		b |= unix.S_ISVTX
	}
	return b
}
