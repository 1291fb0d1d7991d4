package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Formats that Convert makes of an image, by their names and files.
var formats = map[string]struct {
	file string
	make func(ctx context.Context, dir string, m Manifest, out string) error
}{
	"qcow2": {"bulkhead.qcow2", makeQcow2},
	"iso":   {"bulkhead.iso", makeISO},
}

// Convert makes another form of the image in dir, beside the others: "qcow2", the disk packed as clouds and QEMU take it, or "iso", a
// medium that boots the same signed image and from which a machine is installed. It needs no keys: nothing is signed anew.
func Convert(ctx context.Context, dir, format string) (Output, error) {
	f, ok := formats[format]
	if !ok {
		return Output{}, fmt.Errorf("format %q: want qcow2 or iso", format)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Output{}, err
	}
	unlock, err := lockFolder(dir)
	if err != nil {
		return Output{}, err
	}
	defer unlock()
	m, err := ReadManifest(dir)
	if err != nil {
		return Output{}, err
	}
	tmp := filepath.Join(dir, f.file+".new")
	defer os.Remove(tmp)
	if err := f.make(ctx, dir, m, tmp); err != nil {
		return Output{}, fmt.Errorf("%s: %w", f.file, err)
	}
	out := filepath.Join(dir, f.file)
	if err := os.Rename(tmp, out); err != nil {
		return Output{}, err
	}
	return describe(out)
}

func makeQcow2(ctx context.Context, dir string, _ Manifest, out string) error {
	_, err := tool(ctx, nil, "qemu-utils", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", filepath.Join(dir, diskFile), out)
	return err
}

const (
	isoSector  = 2048
	isoESP     = "efi.img" // its file in the ISO's own file system
	isoRecord  = 17        // sector of El Torito's boot record
	isoMinimum = 40 * mib  // smallest EFI partition that is FAT32
)

// makeISO writes an ISO whose EFI partition, root and hash tree are partitions, too: the firmware finds the first as that of a CD or of a disk,
// PID 1 finds the others by their GUIDs, as on every disk. As a CD it boots only so far: Linux knows no partitions there.
func makeISO(ctx context.Context, dir string, m Manifest, out string) error {
	work, err := os.MkdirTemp(dir, "iso-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	root, err := hex.DecodeString(m.RootHash)
	if err != nil || len(root) != 32 {
		return fmt.Errorf("the manifest's root hash is %q", m.RootHash)
	}
	hash := [32]byte(root)
	files, err := readESP(ctx, filepath.Join(dir, diskFile), m)
	if err != nil {
		return err
	}
	total := 0
	for _, f := range files {
		total += len(f.data)
	}
	size := max(isoMinimum, int64(up(total+8*mib, mib)))
	if err := makeESP(ctx, filepath.Join(work, isoESP), size, binary.BigEndian.Uint32(root), files); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(work, manifestFile), filepath.Join(dir, manifestFile)); err != nil {
		return err
	}
	if _, err := tool(ctx, nil, "xorriso", "xorriso", "-as", "mkisofs", "-quiet", "-volid", "BULKHEAD", "-o", out,
		"--set_all_file_dates", epoch.Format("20060102150405")+"00", "-e", isoESP, "-no-emul-boot", work); err != nil {
		return err
	}
	return partitionISO(out, dir, hash, size)
}

// readESP reads the files of the EFI partition of an image's disk.
func readESP(ctx context.Context, disk string, m Manifest) ([]espFile, error) {
	files := espFiles(m.Version, nil, nil, nil)
	for i := range files {
		var err error
		if files[i].data, err = tool(ctx, nil, "mtools", "mcopy", "-i", disk+"@@1M", "::/"+files[i].name, "-"); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// partitionISO appends the root and its hash tree to an ISO, and gives it a partition table in the 32 KiB that an ISO leaves to others.
func partitionISO(iso, dir string, root [32]byte, espSize int64) error {
	f, err := os.OpenFile(iso, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	esp, err := findESP(f)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	table, next := gpt.Table{DiskGUID: derived("ISO", root)}, fi.Size()
	add := func(typ, id gpt.GUID, name string, start, size int64) {
		table.Partitions = append(table.Partitions, gpt.Partition{
			Number: len(table.Partitions) + 1, Type: typ, GUID: id, Name: name, Attributes: gpt.AttrReadOnly | gpt.AttrNoAutoMount,
			First: uint64(start / gpt.SectorSize), Last: uint64((start+size)/gpt.SectorSize) - 1,
		})
	}
	add(gpt.EFISystem, derived("ISO ESP", root), "ESP", esp, espSize)
	for _, p := range []struct {
		name, file string
		typ, id    gpt.GUID
	}{{"ROOT-A", rootFile, gpt.Root, gpt.GUID(root[:16])}, {"VERITY-A", treeFile, gpt.RootVerity, gpt.GUID(root[16:])}} {
		start := int64(up(int(next), mib))
		if err := copyTo(f, start, filepath.Join(dir, p.file)); err != nil {
			return err
		}
		fi, err := os.Stat(filepath.Join(dir, p.file))
		if err != nil {
			return err
		}
		next = start + fi.Size()
		add(p.typ, p.id, p.name, start, fi.Size())
	}
	size := int64(up(int(next), mib)) + mib // room for the table's second copy
	if err := f.Truncate(size); err != nil {
		return err
	}
	return errors.Join(table.WriteTo(f, size), f.Close())
}

// findESP returns where El Torito says that the EFI partition starts.
func findESP(f *os.File) (int64, error) {
	record := make([]byte, isoSector)
	if _, err := f.ReadAt(record, isoRecord*isoSector); err != nil {
		return 0, err
	}
	if !bytes.HasPrefix(record, []byte("\x00CD001\x01EL TORITO SPECIFICATION")) {
		return 0, errors.New("the ISO has no boot record")
	}
	catalog := make([]byte, 64)
	if _, err := f.ReadAt(catalog, int64(binary.LittleEndian.Uint32(record[0x47:]))*isoSector); err != nil {
		return 0, err
	}
	const efi, bootable = 0xef, 0x88
	if catalog[0] != 1 || catalog[1] != efi || catalog[32] != bootable {
		return 0, errors.New("the ISO's first boot entry is not for EFI")
	}
	return int64(binary.LittleEndian.Uint32(catalog[40:])) * isoSector, nil
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// up rounds n up to a multiple of step.
func up(n, step int) int { return (n + step - 1) / step * step }

// Formats returns the names of what Convert can make, in order.
func Formats() (names []string) {
	for name := range formats {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
