package storaged

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// An image written to a larger disk leaves its backup copy in the middle: that is no data that could be lost, neither before
// the repair nor after it. What somebody else put there is.
func TestGrownDisk(t *testing.T) {
	const image, disk = 64 << 20, 256 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table := gpt.Table{DiskGUID: newGUID(), Partitions: []gpt.Partition{{Number: 1, Type: gpt.LinuxGeneric, GUID: newGUID(), Name: "ROOT-A", First: 2048, Last: image/512 - 2049}}}
	if err := f.Truncate(image); err != nil {
		t.Fatal(err)
	}
	if err := table.WriteTo(f, image); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(disk); err != nil {
		t.Fatal(err)
	}
	look := func(when string, repair bool, tail probe.Kind) {
		t.Helper()
		d := Disk{Size: disk}
		if err := d.read(f, nil); err != nil {
			t.Fatal(err)
		}
		if d.Tail.Kind != tail || (d.Repair != "") != repair {
			t.Errorf("%s: free space has %q, repair %q; want %q, repair %v", when, d.Tail.Kind, d.Repair, tail, repair)
		}
	}
	look("grown", true, probe.Empty)
	if err := (&linux{}).table(f.Name(), func(*os.File, *gpt.Table) error { return nil }); err != nil {
		t.Fatal(err)
	}
	look("repaired", false, probe.Empty)
	if _, err := f.WriteAt([]byte("somebody's"), image-256<<10); err != nil {
		t.Fatal(err)
	}
	look("with data", false, probe.Unknown)
}
