package storaged

import (
	"fmt"
	"strings"

	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// Op is what a step does.
type Op string

// The steps there are. Each leaves the disk such that the next look sees how far things got.
const (
	opCreate Op = "gpt create" // writes an empty table
	opRemove Op = "gpt remove" // takes a foreign partition out
	opRepair Op = "gpt repair" // writes both copies anew, the backup at the end of the disk
	opAdd    Op = "gpt add"    // adds a volume, marked as unformatted
	opGrow   Op = "gpt grow"   // moves a volume's end
	opTell   Op = "partition"  // tells the kernel where a partition is
	opMkfs   Op = "mkfs"       // and takes the mark away
	opFsck   Op = "fsck"
	opMount  Op = "mount"
	opGrowFS Op = "grow" // makes a mounted file system as large as its partition
	opEntry  Op = "entry"

	opLay  Op = "install partitions" // adds those of the system, ESP and ROOT-A with the mark that they hold nothing
	opRoot Op = "install root"       // copies it and its hash tree, reads them back, and takes ROOT-A's mark away
	opBoot Op = "install boot files" // copies them, reads them back, makes the disk one that a firmware starts, and takes the ESP's mark away
	opDone Op = "install done"       // takes the ESP's mark away

	opLUKS    Op = "luks format" // makes an encrypted volume and opens it
	opOpen    Op = "luks open"   // by what opens it without a person
	opClose   Op = "luks close"
	opHeader  Op = "luks repair" // writes both copies of the header anew
	opGrowMap Op = "luks grow"   // makes the open device as large as its partition
	opKey     Op = "luks key"    // adds a key that Storage.keys wants
	opCap     Op = "tpm cap"     // from here on nothing opens by the TPM
	opOwner   Op = "tpm owner"   // sets the TPM owner's authorisation

	opHold     Op = "reset hold"   // from here on the loop uses no volume
	opRelease  Op = "reset cancel" // takes that back
	opDoom     Op = "reset begin"  // marks a disk's volumes to be destroyed: the moment
	opLeave    Op = "leave"        // unmounts and closes a volume, or lets its file system write no more
	opDestroy  Op = "destroy"      // a volume's keys and, where the disk can, all of it
	opDrop     Op = "gpt drop"     // takes destroyed volumes out of the table
	opRemoveOS Op = "remove the system"
)

// A Step is one change. Fields that its Op does not need are zero.
type Step struct {
	Op          Op
	Volume      VolumeName
	Disk        string // "/dev/vda"
	Device      string // "/dev/vda5"
	Number      int
	Start, Size int64  // of the partition, in bytes
	Over        string // what is lost; "" if nothing that plan knows of
	Wipe        bool   // foreign data may be lost
	Entry       entry
	Encrypted   bool         // the file system is on the open device over Device
	Keys        []vault.Kind // that a new encrypted volume gets
	Wish        vault.Wish
}

// on names the device that a file system is on.
func (s Step) on() string {
	if s.Encrypted {
		return vault.MapName(string(s.Volume))
	}
	return s.Device
}

// String is the form for people; the same in tests, logs and status.
func (s Step) String() string {
	over := ""
	if s.Over != "" {
		over = " over " + s.Over
	}
	switch s.Op {
	case opCreate:
		return fmt.Sprintf("gpt create on %s%s", s.Disk, over)
	case opRemove:
		return fmt.Sprintf("gpt remove %s on %s", s.Over, s.Disk)
	case opRepair:
		return fmt.Sprintf("gpt repair on %s", s.Disk)
	case opAdd:
		return fmt.Sprintf("gpt add %s %s on %s%s", s.Volume, sizeText(s.Size), s.Disk, over)
	case opGrow:
		return fmt.Sprintf("gpt grow %s to %s on %s", s.Volume, sizeText(s.Size), s.Disk)
	case opLay:
		return fmt.Sprintf("%s %s on %s", s.Op, sizeText(s.Size), s.Disk)
	case opRoot, opBoot, opDone:
		return fmt.Sprintf("%s on %s", s.Op, s.Disk)
	case opTell:
		return fmt.Sprintf("partition %s at %s size %s", s.Device, sizeText(s.Start), sizeText(s.Size))
	case opEntry:
		return s.Entry.String()
	case opCap, opOwner, opHold, opRelease:
		return string(s.Op)
	case opDoom, opDrop, opRemoveOS:
		return fmt.Sprintf("%s on %s", s.Op, s.Disk)
	}
	v := volumeNamed(s.Volume)
	switch s.Op {
	case opMkfs:
		return fmt.Sprintf("mkfs ext4 %s label %s", s.on(), v.label)
	case opMount:
		return fmt.Sprintf("mount %s on %s %s", s.on(), v.target, v.options)
	case opGrowFS:
		return fmt.Sprintf("grow %s to the end of %s", v.name, s.on())
	case opFsck:
		return "fsck " + s.on()
	case opLUKS:
		return fmt.Sprintf("luks format %s on %s with %s", v.name, s.Device, joined(s.Keys))
	case opKey:
		return fmt.Sprintf("luks key for %s: %s", v.name, s.Wish)
	}
	return fmt.Sprintf("%s %s on %s", s.Op, s.Volume, s.Device)
}

// joined lists kinds of keys: "recovery, tpm".
func joined(kinds []vault.Kind) string {
	var all []string
	for _, k := range kinds {
		all = append(all, string(k))
	}
	return strings.Join(all, ", ")
}

func (e entry) String() string {
	at := volumeNamed(e.volume).target + "/" + e.path
	switch {
	case e.link != "":
		return fmt.Sprintf("link %s to %s", at, e.link)
	case e.marker:
		return "mark " + at
	}
	mode := uint32(e.mode.Perm())
	if e.mode != e.mode.Perm() {
		mode |= 0o1000
	}
	return fmt.Sprintf("folder %s owner %s mode %04o", at, e.owner.Name(), mode)
}
