package machine

import (
	"errors"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/test/judge"
)

// A broken is a disk to break.
type broken struct {
	*powercut.State
	table gpt.Table
	found judge.Found
}

func (b broken) part(name string) powercut.Section {
	q, _ := b.table.ByName(name)
	return powercut.Section{Device: b, From: q.Start(), Length: q.Size()}
}

// flip changes one bit.
func (b broken) flip(part string, at int64) error {
	one, s := make([]byte, 1), b.part(part)
	_, err := s.ReadAt(one, at)
	one[0] ^= 1
	_, werr := s.WriteAt(one, at)
	return errors.Join(err, werr)
}

// zero overwrites a part of a partition.
func (b broken) zero(part string, at, length int64) error {
	_, err := b.part(part).WriteAt(make([]byte, length), at)
	return err
}

// file changes a file of the EFI partition, in its middle.
func (b broken) file(dir, name string) error {
	esp := b.part("ESP")
	v, err := fat.Open(esp, esp.Length)
	if err != nil {
		return err
	}
	f, err := v.Open(dir, name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("broken"), f.Size/2)
	return err
}

// faults are what the judge is there to see, and what it says then.
var faults = []struct {
	want string
	do   func(broken) error
}{
	{"no kernel that was ever whole", func(b broken) error { return b.file("EFI/Linux", b.found.Entry) }},
	{"not the boot loader any more", func(b broken) error { return b.file("EFI/BOOT", "BOOTX64.EFI") }},
	{"which is not whole: the data have the root hash", func(b broken) error { return b.flip("ROOT-A", 5<<20) }},
	{"which is not whole: the hash tree is wrong", func(b broken) error { return b.flip("VERITY-A", 5000) }},
	{"which no slot has", func(b broken) error { return b.rename("ROOT-A", func(p *gpt.Partition) { p.GUID[0] ^= 1 }) }},
	{"partition table", func(b broken) error {
		_, err := b.WriteAt(make([]byte, 1024), 512)
		_, berr := b.WriteAt(make([]byte, 512), b.Size()-512)
		return errors.Join(err, berr)
	}},
	{"STATE: first copy", func(b broken) error { return errors.Join(b.flip("STATE", 5000), b.flip("STATE", 32<<10+5000)) }},
	{"STATE: no recovery key opens it", func(b broken) error { return b.zero("STATE", 64<<10, 8<<20) }},
	{"VAR: no recovery key opens it", func(b broken) error { return b.zero("VAR", 64<<10, 8<<20) }},
	{"where the file system ext4", func(b broken) error { return b.zero("STATE", 16<<20, 4<<20) }},
	{"the configuration is generation 0", func(b broken) error { return b.rename("STATE", func(p *gpt.Partition) { p.Name = "LOST" }) }},
}

// rename changes an entry of the partition table.
func (b broken) rename(part string, change func(*gpt.Partition)) error {
	t := gpt.Table{DiskGUID: b.table.DiskGUID, Partitions: append([]gpt.Partition(nil), b.table.Partitions...)}
	for i := range t.Partitions {
		if t.Partitions[i].Name == part {
			change(&t.Partitions[i])
		}
	}
	return t.WriteTo(b, b.Size())
}

// notices breaks the disk that the machine has left in every way that the judge is there to see.
func (r *rebuilding) notices(t *testing.T, p *powercut.Replay, found judge.Found) {
	t.Helper()
	table, _, err := gpt.Read(p.Done(), p.Done().Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range faults {
		b := broken{p.Done(), table, found}
		if err := fault.do(b); err != nil {
			t.Fatalf("%s: %v", fault.want, err)
		}
		f, err := r.judge.Look(b)
		if err == nil {
			err = r.allowed(r.s.Marks[len(r.s.Marks)-1], f)
		}
		if err == nil || !strings.Contains(err.Error(), fault.want) {
			t.Errorf("the judge says %v, want %q", err, fault.want)
		}
	}
}
