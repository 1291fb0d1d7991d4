// Package image makes the bootable image of a node: Debian's kernel and a few of its programs, our binaries, and the
// Kubernetes set become a read-only root with a dm-verity tree, an initramfs and a disk with two slots.
//
// What goes where is decided by pure functions that return a Tree or a partition table; writers carry it out. The
// same inputs give the same bytes. It needs no privilege: no mount, no loop device, no owner but the caller.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	_ "embed"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/deploy/image/verity"
)

//go:embed debian.lock
var lockText []byte

// binaries are ours, by their file names in Config.Bin.
var binaries = []string{"init", "bulkheadd", "etcdd", "kubeletd"}

// kubernetesSet is what the folder Config.Kubernetes must hold, besides CNI plugins.
var kubernetesSet = []string{"bin/containerd", "bin/containerd-shim-runc-v2", "bin/ctr", "bin/kube", "bin/runc", "images.tar"}

// Config says what to build from. Every field but ClaimKey and AllowMissing is required.
type Config struct {
	Bin          string // folder of our binaries
	Kubernetes   string // folder that deploy/build-kubernetes.sh made, or "none"
	Out          string // folder of the image; it is replaced as a whole
	Version      string // as in os-release: "1.2.3", "0.1.0-dev"
	Level        int    // of zstd, 1 to 22
	ClaimKey     string // file that becomes /usr/share/bulkhead/claim-key; "" for none
	AllowMissing bool   // build although some of our binaries do not exist
	Cache        debian.Cache
	Log          *slog.Logger
}

var versionForm = regexp.MustCompile(`^[0-9][a-z0-9.+-]{0,63}$`)

// Lock returns the lock that is compiled in.
func Lock() (debian.Lock, error) {
	l, err := debian.ParseLock(lockText)
	if err != nil {
		return l, fmt.Errorf("debian.lock: %w", err)
	}
	return l, nil
}

// RefreshLock returns a lock of the newest versions, all of which it fetches.
func RefreshLock(ctx context.Context, cache debian.Cache) (debian.Lock, error) {
	l, err := cache.Resolve(ctx, suite, packages)
	if err != nil {
		return l, err
	}
	files, err := cache.Read(ctx, l, wanted)
	if err != nil {
		return l, err
	}
	k, err := readKernel(ctx, files)
	if err != nil {
		return l, err
	}
	_, err = rootTree(inputs{version: "0", debian: files, release: k.release, early: k.early, late: k.late})
	return l, err
}

// Build makes the image, unless it is there already and made of the same. It returns its manifest, and whether it
// did anything. Two builds for the same folder wait for each other.
func Build(ctx context.Context, cfg Config) (m Manifest, built bool, err error) {
	if !versionForm.MatchString(cfg.Version) {
		return m, false, fmt.Errorf("version %q: want a digit, then small letters, digits and . + -", cfg.Version)
	}
	unlock, err := lockFolder(cfg.Out)
	if err != nil {
		return m, false, err
	}
	defer unlock()
	src, err := gather(cfg)
	if err != nil {
		return m, false, err
	}
	st, err := src.stamp(cfg)
	if err != nil {
		return m, false, err
	}
	if old, err := ReadManifest(cfg.Out); err == nil && readStamp(cfg.Out).Digest == st.Digest && complete(cfg.Out, old) {
		return old, false, st.write(cfg.Out)
	}
	tmp := cfg.Out + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return m, false, err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return m, false, err
	}
	defer os.RemoveAll(tmp)
	if m, err = build(ctx, cfg, src, tmp); err != nil {
		return m, false, err
	}
	if err := st.write(tmp); err != nil {
		return m, false, err
	}
	return m, true, replace(cfg.Out, tmp)
}

// replace puts the folder tmp in the place of out.
func replace(out, tmp string) error {
	old := out + ".old"
	if err := os.RemoveAll(old); err != nil {
		return err
	}
	if err := os.Rename(out, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, out); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

func lockFolder(out string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(out+".lock", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// sources are the files on the host that an image is made of.
type sources struct {
	lock      debian.Lock
	bin, kube map[string]string
	claimKey  string
	missing   []string
}

func gather(cfg Config) (s sources, err error) {
	if s.lock, err = Lock(); err != nil {
		return s, err
	}
	s.bin, s.kube = map[string]string{}, map[string]string{}
	for _, name := range binaries {
		if file := filepath.Join(cfg.Bin, name); isFile(file) {
			s.bin[name] = file
		} else {
			s.missing = append(s.missing, file)
		}
	}
	if cfg.Kubernetes != "none" {
		for _, name := range kubernetesSet {
			if file := filepath.Join(cfg.Kubernetes, name); isFile(file) {
				s.kube[name] = file
			} else {
				s.missing = append(s.missing, file)
			}
		}
		plugins, err := filepath.Glob(filepath.Join(cfg.Kubernetes, "cni", "*"))
		if err != nil {
			return s, err
		}
		if len(plugins) == 0 {
			s.missing = append(s.missing, filepath.Join(cfg.Kubernetes, "cni/*"))
		}
		for _, file := range plugins {
			s.kube["cni/"+filepath.Base(file)] = file
		}
	}
	if len(s.missing) > 0 && !cfg.AllowMissing {
		return s, fmt.Errorf("missing: %s (\"make build\" makes them; --kubernetes none and --allow-missing do without)", strings.Join(s.missing, ", "))
	}
	s.claimKey = cfg.ClaimKey
	return s, nil
}

func isFile(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.Mode().IsRegular()
}

func (s sources) stamp(cfg Config) (stamp, error) {
	files := map[string]string{}
	for name, file := range s.bin {
		files["bin/"+name] = file
	}
	for name, file := range s.kube {
		files["kubernetes/"+name] = file
	}
	if s.claimKey != "" {
		files["claim-key"] = s.claimKey
	}
	self, err := os.Executable()
	if err != nil {
		return stamp{}, err
	}
	files["mkimage"] = self
	tool, _ := exec.Command("mksquashfs", "-version").Output()
	first, _, _ := strings.Cut(string(tool), "\n")
	return newStamp(readStamp(cfg.Out), []string{cfg.Version, fmt.Sprint(cfg.Level), string(lockText), first}, files)
}

// build writes the whole image into the empty folder dir.
func build(ctx context.Context, cfg Config, src sources, dir string) (Manifest, error) {
	m := Manifest{Version: cfg.Version, Packages: map[string]string{}}
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
	root, err := rootTree(inputs{cfg.Version, files, k.release, k.early, k.late, src.bin, src.kube, src.claimKey})
	if err != nil {
		return m, err
	}
	if err := check(root); err != nil {
		return m, err
	}
	if m.Content, err = parts(root); err != nil {
		return m, err
	}
	cfg.Log.Info("pack the root", "entries", len(root))
	hash, err := writeRoot(ctx, dir, root, cfg.Level)
	if err != nil {
		return m, err
	}
	m.RootHash = hex.EncodeToString(hash[:])
	m.Cmdline = cmdline(m.RootHash)
	ramfs, err := initramfsTree(src.bin["init"], k.stage1)
	if err != nil {
		return m, err
	}
	var cpio bytes.Buffer
	if err := writeCPIO(&cpio, ramfs); err != nil {
		return m, err
	}
	err = finish(dir, &m, map[string][]byte{
		"vmlinuz": k.vmlinuz, "initramfs.cpio": cpio.Bytes(), "cmdline": []byte(m.Cmdline + "\n"), "root.txt": []byte(root.String()),
	})
	return m, err
}

// cmdline is the kernel command line that belongs to the image; machines may add to it.
func cmdline(rootHash string) string {
	return "bulkhead bulkhead.verity=" + rootHash + " console=ttyS0 panic=10 quiet loglevel=4 " + protection()
}

// writeRoot writes root.squashfs, root.verity and disk.raw, and returns the root hash.
func writeRoot(ctx context.Context, dir string, root Tree, level int) (hash [32]byte, err error) {
	squashfs := filepath.Join(dir, "root.squashfs")
	if err := makeSquashfs(ctx, root, squashfs, level); err != nil {
		return hash, err
	}
	f, err := os.Open(squashfs)
	if err != nil {
		return hash, err
	}
	defer f.Close()
	salt := sha256.New()
	size, err := io.Copy(salt, f)
	if err != nil {
		return hash, err
	}
	if err := fits("root", size, slotSize); err != nil {
		return hash, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return hash, err
	}
	sum := salt.Sum(nil)
	tree, err := verity.Build(f, sum, [16]byte(sum[:16]))
	if err != nil {
		return hash, err
	}
	if err := fits("hash tree", tree.Size(), treeSize); err != nil {
		return hash, err
	}
	var b bytes.Buffer
	if _, err := tree.WriteTo(&b); err != nil {
		return hash, err
	}
	if err := os.WriteFile(filepath.Join(dir, "root.verity"), b.Bytes(), 0o644); err != nil {
		return hash, err
	}
	return tree.Root, writeDisk(filepath.Join(dir, "disk.raw"), squashfs, tree)
}

// finish writes the small files and the manifest, which describes them all.
func finish(dir string, m *Manifest, small map[string][]byte) error {
	for name, data := range small {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	for _, name := range []string{"vmlinuz", "initramfs.cpio", "cmdline", "root.txt", "root.squashfs", "root.verity", "disk.raw"} {
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
	return os.WriteFile(filepath.Join(dir, "manifest.json"), append(text, '\n'), 0o644)
}
