package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	disk "github.com/bulkhead-os/bulkhead/internal/layout"
)

const (
	espSize = disk.ESPSize

	// FAT32 with clusters of two sectors: the largest that leave enough of them for FAT32 in 128 MiB.
	fatSector   = 512
	fatCluster  = 2 * fatSector
	fatReserved = 32 // sectors before the first table, of which there are two
	fatEntry    = 32 // bytes in a folder; a name takes one, and one more for each 13 characters
)

// An espFile is a file of the EFI partition, by its path without a leading slash.
type espFile struct {
	name string
	data []byte
}

// kernelName is the name of a kernel image on the EFI partition. systemd-boot starts the highest sequence that has tries left; the
// version is for people. An image that is being tried has "+3" before the dot.
func kernelName(sequence int, version string) string {
	return fmt.Sprintf("EFI/Linux/bulkhead_%04d_%s.efi", sequence, version)
}

// loaderConf: nobody waits for a menu, and a machine without keys takes ours by itself where that can be undone, in a virtual machine.
// There is no default entry: the names decide.
const loaderConf = "timeout 0\nsecure-boot-enroll if-safe\n"

// espFiles plans the EFI partition. loader is systemd-boot, kernel the image, both signed; enrol has the .auth files. Pure.
func espFiles(version string, loader, kernel []byte, enrol map[string][]byte) []espFile {
	files := []espFile{
		{"EFI/BOOT/BOOTX64.EFI", loader}, // where firmware looks that remembers nothing
		{"EFI/systemd/systemd-bootx64.efi", loader},
		{kernelName(1, version), kernel},
		{"loader/loader.conf", []byte(loaderConf)},
	}
	for _, k := range secureBoot {
		name := k.name + ".auth"
		files = append(files, espFile{"loader/keys/auto/" + name, enrol[name]})
	}
	return files
}

// folders returns those that the files need, each after the one that it is in.
func folders(files []espFile) (out []string) {
	for _, f := range files {
		var up []string
		for d := path.Dir(f.name); d != "."; d = path.Dir(d) {
			up = append(up, d)
		}
		slices.Reverse(up)
		for _, d := range up {
			if !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
	}
	return out
}

// fatClusters returns how many clusters of data a FAT32 of that size has at least.
func fatClusters(size int64) int64 {
	sectors := size/fatSector - fatReserved
	table := (sectors/2+2)*4/fatSector + 1
	const aligned = 8 // sectors that mkfs.vfat may leave before data
	return (sectors - 2*table - aligned) / (fatCluster / fatSector)
}

// fatNeed returns how many clusters the files and their folders take.
func fatNeed(files []espFile) int64 {
	clusters := func(n int) int64 { return int64(n+fatCluster-1) / fatCluster }
	entries := map[string]int{".": 1} // the label
	var need int64
	count := func(name string) {
		const tries = len("+3-0")
		entries[path.Dir(name)] += 1 + (len(path.Base(name))+tries+12)/13
	}
	for _, d := range folders(files) {
		entries[d] += 2 // itself and the one above
		count(d)
	}
	for _, f := range files {
		need += clusters(len(f.data))
		count(f.name)
	}
	for _, n := range entries {
		need += clusters(n * fatEntry)
	}
	return need
}

// espFits is the proof that the partition takes this image and a second one of its size, as it must in the middle of an upgrade.
func espFits(files []espFile, kernelSize int) error {
	second := espFile{kernelName(9999, strings.Repeat("x", 64)), make([]byte, kernelSize)}
	need, have := fatNeed(append(slices.Clone(files), second))*fatCluster, fatClusters(espSize)*fatCluster
	if need > have {
		return fmt.Errorf("EFI partition: two kernel images of %d bytes and what starts them take %d bytes, %d more than its %d MiB hold", kernelSize, need, need-have, espSize/mib)
	}
	return nil
}

// makeESP writes a FAT32 of at least 40 MiB with the files into a new sparse file. Equal arguments give equal bytes.
func makeESP(ctx context.Context, out string, size int64, serial uint32, files []espFile) error {
	f, err := os.OpenFile(out, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	cluster := fatCluster / fatSector
	if size < espSize {
		cluster = 1 // or there would be too few for FAT32
	}
	if _, err := tool(ctx, nil, "dosfstools", "mkfs.vfat", "-F", "32", "-s", fmt.Sprint(cluster), "-R", fmt.Sprint(fatReserved),
		"-n", "ESP", "--invariant", "-i", fmt.Sprintf("%08x", serial), out); err != nil {
		return err
	}
	for _, d := range folders(files) {
		if _, err := tool(ctx, nil, "mtools", "mmd", "-i", out, "::/"+d); err != nil {
			return err
		}
	}
	for _, file := range files {
		if _, err := tool(ctx, file.data, "mtools", "mcopy", "-i", out, "-", "::/"+file.name); err != nil {
			return fmt.Errorf("%s: %w", file.name, err)
		}
	}
	return nil
}

// tool runs a program of the host, of a Debian package, with everything fixed that could make its output differ from one run to the
// next, and returns what it prints.
func tool(ctx context.Context, stdin []byte, pkg, name string, args ...string) ([]byte, error) {
	program, err := exec.LookPath(name)
	if err != nil { // Debian has some tools where only root's shell looks
		if program, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			return nil, fmt.Errorf("%s is missing: install the package %s", name, pkg)
		}
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()), "TZ=UTC", "LC_ALL=C", "MTOOLSRC=/dev/null")
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}
