package gpt

import (
	"bytes"
	"errors"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

const mib = 1 << 20

var sample = Table{
	DiskGUID: MustGUID("11111111-2222-3333-4444-555555555555"),
	Partitions: []Partition{
		{1, Root, MustGUID("00112233-4455-6677-8899-aabbccddeeff"), 2048, 4095, AttrReadOnly, "ROOT-A"},
		{2, RootVerity, MustGUID("00112233-4455-6677-8899-aabbccddee00"), 4096, 6143, 0, "VERITY-Ä😀"},
		{5, Var, MustGUID("00112233-4455-6677-8899-aabbccddee01"), 8192, 10239, 0, ""},
	},
}

// A disk is a file in memory that knows where it ends.
type disk []byte

func (d disk) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(d).ReadAt(p, off) }
func (d disk) WriteAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > int64(len(d)) {
		return 0, errors.New("behind the end")
	}
	return copy(d[off:], p), nil
}

func written(t *testing.T, size int) disk {
	t.Helper()
	d := make(disk, size)
	if err := sample.WriteTo(d, int64(size)); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestRoundTrip(t *testing.T) {
	d := written(t, 8*mib)
	got, health, err := Read(d, int64(len(d)))
	if err != nil || !health.OK() {
		t.Fatalf("Read: %v, %+v", err, health)
	}
	if !reflect.DeepEqual(got, sample) {
		t.Errorf("got %+v\nwant %+v", got, sample)
	}
}

func TestDamage(t *testing.T) {
	end := func(d disk) int { return len(d) - SectorSize }
	tests := []struct {
		name            string
		harm            func(disk) disk
		primary, backup string // part of what Health says
		err             string
	}{
		{"primary header", func(d disk) disk { d[SectorSize+60]++; return d }, "checksum", "", ""},
		{"primary gone", func(d disk) disk { clear(d[:64*SectorSize]); return d }, "no signature", "", ""},
		{"primary entries", func(d disk) disk { d[2*SectorSize]++; return d }, "entries in sector 2", "", ""},
		{"backup header", func(d disk) disk { d[end(d)]++; return d }, "", "no signature", ""},
		{"backup entries", func(d disk) disk { d[end(d)-1]++; return d }, "", "checksum", ""},
		{"both", func(d disk) disk { d[end(d)]++; d[SectorSize+60]++; return d }, "", "", "primary: header in sector 1"},
		{"mbr", func(d disk) disk { clear(d[:SectorSize]); return d }, "protective MBR", "", ""},
		{"other mbr", func(d disk) disk { d[446+4] = 0x83; return d }, "", "", "has an MBR"},
		{"grown", func(d disk) disk { return append(d, make(disk, mib)...) }, "", "the disk ends at 18431", ""},
		{"shrunk", func(d disk) disk { return d[:len(d)-mib] }, "", "", "before the backup copy"},
		{"blank", func(d disk) disk { clear(d); return d }, "", "", ErrNone.Error()},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := test.harm(written(t, 8*mib))
			got, health, err := Read(d, int64(len(d)))
			match(t, "error", err, test.err)
			match(t, "primary", health.Primary, test.primary)
			match(t, "backup", health.Backup, test.backup)
			if test.err == "" {
				if !reflect.DeepEqual(got, sample) {
					t.Errorf("got %+v\nwant %+v", got, sample)
				}
				if err := got.WriteTo(d, int64(len(d))); err != nil {
					t.Fatal(err)
				}
				if _, health, err := Read(d, int64(len(d))); err != nil || !health.OK() {
					t.Errorf("after repair: %v, %+v", err, health)
				}
			}
		})
	}
}

func match(t *testing.T, what string, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("%s: %v, want none", what, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("%s: %v, want %q", what, err, want)
	}
}

// The power may fail after any sector of a rewrite: either the old or the new table is read.
func TestPowerCut(t *testing.T) {
	changed := sample
	changed.Partitions = append([]Partition{}, sample.Partitions[:2]...)
	chunks, err := changed.Encode(8 * mib)
	if err != nil {
		t.Fatal(err)
	}
	d := written(t, 8*mib)
	for _, c := range chunks {
		for i := 0; i < len(c.Data); i += SectorSize {
			copy(d[c.Offset+int64(i):], c.Data[i:i+SectorSize])
			got, _, err := Read(d, int64(len(d)))
			if err != nil || (!reflect.DeepEqual(got, sample) && !reflect.DeepEqual(got, changed)) {
				t.Fatalf("cut at byte %d of the chunk at %d: %v, %+v", i, c.Offset, err, got)
			}
		}
	}
}

func TestValidate(t *testing.T) {
	tests := []struct {
		change func(*Table)
		want   string
	}{
		{func(t *Table) { t.DiskGUID = GUID{} }, "disk GUID is zero"},
		{func(t *Table) { t.Partitions[1].First = 4095 }, "partition 2: starts at sector 4095, inside partition 1"},
		{func(t *Table) { t.Partitions[2].Number = 2 }, "partition 2: stands behind partition 2"},
		{func(t *Table) { t.Partitions[2].Number = 129 }, "partition 129: number is not in 1 to 128"},
		{func(t *Table) { t.Partitions[0].First = 33 }, "first sector 33 is below 34"},
		{func(t *Table) { t.Partitions[2].Last = 16384 - 33 }, "last sector 16351 is above 16350"},
		{func(t *Table) { t.Partitions[2].Last = 8191 }, "before the first"},
		{func(t *Table) { t.Partitions[2].GUID = t.Partitions[0].GUID }, "same GUID"},
		{func(t *Table) { t.Partitions[0].Type = GUID{} }, "type is zero"},
		{func(t *Table) { t.Partitions[0].Name = strings.Repeat("x", 37) }, "longer than 36"},
		{func(t *Table) { t.Partitions[0].Name = "a\x00b" }, "not text"},
	}
	for _, test := range tests {
		table := sample
		table.Partitions = append([]Partition{}, sample.Partitions...)
		test.change(&table)
		match(t, test.want, table.Validate(8*mib), test.want)
	}
}

func TestGUID(t *testing.T) {
	g := MustGUID("C12A7328-F81F-11d2-ba4b-00a0c93ec93b")
	if got := g.String(); got != "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" {
		t.Error(got)
	}
	if g.swapped()[0] != 0x28 || g.swapped().swapped() != g {
		t.Errorf("swapped: %x", g.swapped())
	}
	for _, bad := range []string{"", "c12a7328", "c12a7328xf81f-11d2-ba4b-00a0c93ec93b", "g12a7328-f81f-11d2-ba4b-00a0c93ec93b"} {
		if _, err := ParseGUID(bad); err == nil {
			t.Errorf("ParseGUID(%q) succeeded", bad)
		}
	}
}

// TestOracle lets sgdisk judge what is written here, and reads what sgdisk writes.
func TestOracle(t *testing.T) {
	sgdisk, err := exec.LookPath("sgdisk")
	if err != nil {
		t.Skip("no sgdisk")
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, written(t, 8*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(sgdisk, "--verify", "--info=2", file).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("No problems found")) || !bytes.Contains(out, []byte("00112233-4455-6677-8899-AABBCCDDEE00")) {
		t.Errorf("sgdisk: %v\n%s", err, out)
	}
	if out, err := exec.Command(sgdisk, "--zap-all", "--new=3:2048:+1M", "--change-name=3:theirs", "--typecode=3:8304", file).CombinedOutput(); err != nil {
		t.Fatalf("sgdisk: %v\n%s", err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, health, err := Read(f, 8*mib)
	if err != nil || !health.OK() {
		t.Fatalf("Read: %v, %+v", err, health)
	}
	p, ok := table.ByName("theirs")
	if !ok || p.Number != 3 || p.Type != Root || p.Start() != mib || p.Size() < mib {
		t.Errorf("got %+v", table)
	}
}

// FuzzRead checks that nothing makes Read fall over, and that what it accepts can be written and read again. It
// mends the checksums, or nothing interesting would ever pass them.
func FuzzRead(f *testing.F) {
	const size = 256 << 10
	small := sample
	small.Partitions = []Partition{{7, Root, sample.DiskGUID, 40, 50, 1, "x"}}
	chunks, err := small.Encode(size)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(chunks[1].Data[SectorSize:][:headerSize], chunks[1].Data[2*SectorSize+6*entrySize:][:entrySize], true)
	f.Add(chunks[1].Data[SectorSize:][:headerSize], chunks[1].Data[2*SectorSize+6*entrySize:][:entrySize], false)
	testfuzz.Run(f, func(t *testing.T, header, entries []byte, mend bool) {
		d := make(disk, size)
		copy(d[SectorSize:2*SectorSize], header)
		copy(d[2*SectorSize:FirstUsable*SectorSize], entries)
		if h := d[SectorSize:]; mend {
			le.PutUint32(h[88:], crc32.ChecksumIEEE(d[2*SectorSize:FirstUsable*SectorSize]))
			clear(h[16:20])
			le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:headerSize]))
		}
		table, _, err := Read(d, size)
		if err != nil {
			return
		}
		if err := table.WriteTo(d, size); err != nil {
			t.Fatalf("accepted but not writable: %v", err)
		}
		again, health, err := Read(d, size)
		if err != nil || !health.OK() || !reflect.DeepEqual(again, table) {
			t.Fatalf("read %+v, wrote it, and read %+v (%v, %+v)", table, again, err, health)
		}
	})
}
