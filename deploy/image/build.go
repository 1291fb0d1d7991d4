package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

// Names of the files of an image.
const (
	rootFile     = bundle.RootName
	treeFile     = bundle.TreeName
	kernelFile   = bundle.KernelName
	diskFile     = "disk.raw"
	updateFile   = "bulkhead.update"
	manifestFile = "manifest.json"
)

// build writes the whole image into the empty folder dir.
func build(ctx context.Context, cfg Config, src sources, dir string) (Manifest, error) {
	m := Manifest{Version: cfg.Version, Epoch: cfg.Epoch, Packages: map[string]string{}}
	if err := cfg.Cache.Fetch(ctx, src.lock); err != nil {
		return m, err
	}
	for _, p := range src.lock.Packages {
		m.Packages[p.Name] = p.Version
	}
	for _, name := range src.missing {
		m.Missing = append(m.Missing, filepath.Base(name))
	}
	cfg.Log.Info("unpack packages")
	files, err := cfg.Cache.Read(ctx, src.lock, wanted)
	if err != nil {
		return m, err
	}
	k, err := readKernel(ctx, files)
	if err != nil {
		return m, err
	}
	m.Kernel = k.release
	initramfs, err := makeInitramfs(src.bin["init"], k)
	if err != nil {
		return m, err
	}
	boot, err := newBootSet(cfg, files, k, initramfs)
	if err != nil {
		return m, err
	}
	if err := boot.check(); err != nil {
		return m, err
	}
	public, err := cfg.Keys.publicKeys()
	if err != nil {
		return m, err
	}
	root, err := rootTree(inputs{cfg.Version, files, k.release, k.early, k.late, src.bin, src.kube, public, src.claimKey})
	if err != nil {
		return m, err
	}
	if err := check(root); err != nil {
		return m, err
	}
	if m.Content, err = parts(root); err != nil {
		return m, err
	}
	small := map[string][]byte{"vmlinuz": k.vmlinuz, "initramfs.cpio": initramfs, "root.txt": []byte(root.String())}
	for name, c := range cfg.Keys.Certificates {
		small[name+".crt"] = certificatePEM(c)
	}
	made, err := programs(root)
	if err != nil {
		return m, err
	}
	cfg.Log.Info("pack the root", "entries", len(root))
	if err := writeFiles(dir, small); err != nil {
		return m, err
	}
	hash, err := assemble(ctx, cfg, dir, root, boot, &m)
	if err != nil {
		return m, err
	}
	if err := writeSBOM(filepath.Join(dir, sbomFile), sbom(cfg.Version, hash, made, src.lock)); err != nil {
		return m, err
	}
	err = finish(dir, &m)
	return m, err
}

func makeInitramfs(init string, k kernel) ([]byte, error) {
	tree, err := initramfsTree(init, k.stage1)
	if err != nil {
		return nil, err
	}
	var cpio bytes.Buffer
	err = writeCPIO(&cpio, tree)
	return cpio.Bytes(), err
}

// assemble packs the root, makes the kernel image that knows its hash, and from both the disk and the update. It returns the hash.
func assemble(ctx context.Context, cfg Config, dir string, root Tree, boot bootSet, m *Manifest) (hash [32]byte, err error) {
	squashfs := filepath.Join(dir, rootFile)
	if err := makeSquashfs(ctx, root, squashfs, cfg.Level); err != nil {
		return hash, err
	}
	tree, err := hashRoot(squashfs)
	if err != nil {
		return hash, err
	}
	m.RootHash = hex.EncodeToString(tree.Root[:])
	m.Cmdline = cmdline(m.RootHash, cfg.Epoch, cfg.Append)
	kernel, err := boot.kernel(m.RootHash)
	if err != nil {
		return hash, err
	}
	m.Boot = boot.describe(kernel)
	var hashes bytes.Buffer
	if _, err := tree.WriteTo(&hashes); err != nil {
		return hash, err
	}
	if err := writeFiles(dir, map[string][]byte{"cmdline": []byte(m.Cmdline + "\n"), kernelFile: kernel.image, treeFile: hashes.Bytes()}); err != nil {
		return hash, err
	}
	esp := filepath.Join(dir, "esp.img")
	defer os.Remove(esp) // it is part of the disk
	serial := binary.BigEndian.Uint32(tree.Root[:])
	if err := makeESP(ctx, esp, espSize, serial, boot.files(kernel)); err != nil {
		return hash, err
	}
	if err := writeDisk(filepath.Join(dir, diskFile), esp, squashfs, tree); err != nil {
		return hash, err
	}
	return tree.Root, writeUpdate(cfg, dir, tree.Root)
}

// hashRoot returns the hash tree of a packed root, having checked that both fit their partitions.
func hashRoot(squashfs string) (*verity.Tree, error) {
	f, err := os.Open(squashfs)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	salt := sha256.New()
	size, err := io.Copy(salt, f)
	if err != nil {
		return nil, err
	}
	if err := fits("root", size, slotSize); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	sum := salt.Sum(nil)
	tree, err := verity.Build(f, sum, [16]byte(sum[:16]))
	if err != nil {
		return nil, err
	}
	return tree, fits("hash tree", tree.Size(), treeSize)
}

// writeUpdate writes the bundle by which a node that runs comes to this image.
func writeUpdate(cfg Config, dir string, root [32]byte) error {
	f, err := os.Create(filepath.Join(dir, updateFile))
	if err != nil {
		return err
	}
	img := bundle.Image{Version: cfg.Version, Minimum: cfg.Minimum, Architecture: runtime.GOARCH, Epoch: cfg.Epoch, RootHash: root}
	for i, name := range []string{kernelFile, rootFile, treeFile} {
		img.Files[i] = filepath.Join(dir, name)
	}
	_, err = bundle.Write(f, img, cfg.Keys.Release)
	return errors.Join(err, f.Close())
}

func writeFiles(dir string, files map[string][]byte) error {
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// outputs are all files of an image but the manifest, which describes them.
var outputs = []string{
	"vmlinuz", "initramfs.cpio", "cmdline", kernelFile, rootFile, treeFile, diskFile, updateFile,
	"root.txt", sbomFile, "PK.crt", "KEK.crt", "db.crt",
}

// finish writes the manifest.
func finish(dir string, m *Manifest) error {
	for _, name := range outputs {
		o, err := describe(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		m.Files = append(m.Files, o)
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestFile), append(text, '\n'), 0o644)
}
