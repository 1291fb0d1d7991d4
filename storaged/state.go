package storaged

import (
	"fmt"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
	"github.com/bulkhead-os/bulkhead/storaged/wipe"
)

// State is what one look found. It is data only: plan needs nothing else.
type State struct {
	Disks   []Disk  // sorted by device
	Mounts  []Mount // in the order in which they were made
	Volumes map[VolumeName]Space
	// Entries has, for every mounted volume, what is in the place of each of its entries; see found.
	Entries map[VolumeName]map[string]found
	TPM     vault.Machine
	Install Installation
	Reset   bool // the node is being reset: nothing is made, opened or mounted until it restarts
	// Wiped says how volumes were destroyed since the start of this process.
	Wiped map[VolumeName]wipe.How
}

// Installation is what was seen of one that this machine may be in.
type Installation struct {
	// NoBoot is why nothing can be installed: the machine was not started by a firmware from a disk that has boot files. "" if it was.
	NoBoot string
	// Began is true if this boot has copied something: so it was started from a medium, and should be restarted when all is there.
	Began bool
	// Recovery is true while a recovery key waits to be written down.
	Recovery bool
	// Progress is of the step that runs.
	Progress Progress
}

// Disk is one whole disk.
type Disk struct {
	Device     string // "/dev/vda"
	Size       int64  // bytes
	SectorSize int    // bytes, logical
	Transport  string
	Model      string
	Serial     string
	WWN        string // "eui.0025…", "naa.5000…": what no other disk has
	ReadOnly   bool
	Removable  bool // the medium can be taken out
	Rotational bool
	System     bool // the running system was started from it
	Busy       bool // the disk itself, not a partition, is mounted or part of another device

	Content probe.Result
	// Unreadable is why the disk cannot be read; "" if it can.
	Unreadable string
	// HasTable is true if Partitions are those of a GPT; else they are those that the kernel knows, without GUIDs and names.
	HasTable   bool
	GUID       gpt.GUID
	Partitions []Partition // in the order of their numbers
	// TableError is why a GPT cannot be used, Repair what is wrong with one of its copies; "" if nothing.
	TableError, Repair string
	// Tail is what the free space behind the last partition starts with; only of disks that have a table.
	Tail probe.Result
}

// Partition is one partition of a disk.
type Partition struct {
	gpt.Partition
	// Device is its node, "/dev/vda5"; "" if the kernel does not know the partition.
	Device string
	Dev    string // "254:5"
	// KernelStart and KernelSize are in bytes, as the kernel has them.
	KernelStart, KernelSize int64
	Busy                    bool // mounted or part of another device
	Content                 probe.Result

	// LUKS is what the header of an encrypted partition says, and Why why it did not open when that was tried last.
	LUKS vault.Header
	Why  string
	// Map is the open device over it; its Device is "" while there is none.
	Map Map
}

// Map is the open device of an encrypted volume.
type Map struct {
	Device  string // "/dev/dm-1"
	Dev     string // "253:1"
	Size    int64  // bytes
	Content probe.Result
}

// encrypted reports whether a partition holds LUKS, open or locked.
func (p Partition) encrypted() bool { return p.Content.Kind == probe.LUKS }

// data is where the file system of a volume is: on the partition, or on the open device over it. All is zero while that is locked.
func (p Partition) data() Map {
	if p.encrypted() {
		return p.Map
	}
	return Map{p.Device, p.Dev, p.KernelSize, p.Content}
}

// Mount is a mounted file system that lies on a block device.
type Mount struct {
	Source, Target, Filesystem, Options string
	Dev                                 string // "254:5"
}

// Space is of a mounted volume, in bytes.
type Space struct{ Size, Free int64 }

// found says what was seen in the place of an entry.
type found uint8

const (
	absent  found = iota // nothing
	good                 // as it must be
	skewed               // a folder with another owner or mode
	another              // something else, or a way there that leads over a symbolic link
)

// String names a disk in messages: `/dev/vdb (10GiB, "WDC WD10")`.
func (d Disk) String() string {
	if d.Model == "" {
		return fmt.Sprintf("%s (%s)", d.Device, sizeText(d.Size))
	}
	return fmt.Sprintf("%s (%s, %q)", d.Device, sizeText(d.Size), d.Model)
}

// describe names a partition in messages: `partition 1 "data" (ext4 "backup", 10GiB)`.
func (p Partition) describe() string {
	name := ""
	if p.Name != "" {
		name = fmt.Sprintf(" %q", p.Name)
	}
	return fmt.Sprintf("partition %d%s (%s, %s)", p.Number, name, p.Content, sizeText(p.Size()))
}

// mounted returns the topmost mount at a target.
func (s State) mounted(target string) (Mount, bool) {
	for i := len(s.Mounts) - 1; i >= 0; i-- {
		if s.Mounts[i].Target == target {
			return s.Mounts[i], true
		}
	}
	return Mount{}, false
}

// isMounted reports whether a volume's partition, or the open device over it, is mounted where it belongs.
func (s State) isMounted(v volume, p Partition) bool {
	m, ok := s.mounted(v.target)
	dev := p.data().Dev
	return ok && dev != "" && m.Dev == dev
}

// free is the space behind the last partition, in bytes: aligned, and before the backup copy of the table.
func free(t gpt.Table, size int64) (start, length int64) {
	start = align
	for _, p := range t.Partitions {
		start = max(start, int64(p.Last+1)*gpt.SectorSize)
	}
	start = (start + align - 1) / align * align
	end := int64(gpt.LastUsable(size)+1) * gpt.SectorSize / align * align
	return start, max(0, end-start)
}

// table returns the disk's table as package gpt has it. The slice is new.
func (d Disk) table() gpt.Table {
	t := gpt.Table{DiskGUID: d.GUID}
	for _, p := range d.Partitions {
		t.Partitions = append(t.Partitions, p.Partition)
	}
	return t
}

// node returns the device of a disk's partition, whether it exists or not.
func node(disk string, number int) string {
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		return fmt.Sprintf("%sp%d", disk, number)
	}
	return fmt.Sprintf("%s%d", disk, number)
}

// sizeText writes a size for people: exact if it is a whole number of MiB, rounded down to one if not.
func sizeText(n int64) string {
	if n >= mib {
		n = n / mib * mib
	}
	if n >= 10*gib && n%gib != 0 {
		return fmt.Sprintf("%.1fGiB", float64(n)/gib)
	}
	s := config.Size(n).String()
	if !strings.HasSuffix(s, "B") {
		s += " bytes"
	}
	return s
}
