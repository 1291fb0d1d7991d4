package storaged

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// ownFolder is storaged's own on STATE: VAR's key and the TPM owner's authorisation.
const ownFolder = "storaged"

// runtimeFolder is storaged's folder that lives as long as the machine runs.
const runtimeFolder = unit.RunDir + "/storaged"

// lockedFile is unit.LockedFile.
const lockedFile = "locked"

// nodeVault is the vault with the node's own places.
func nodeVault(relay vault.Relay) *vault.Vault {
	return vault.New(vault.Config{
		Mapper: func() (vault.Mapper, error) { return dm.Open("/dev/mapper/control") },
		TPM:    func() (*tpm.TPM, error) { return tpm.Open("/dev/tpmrm0") },
		Boot:   unit.RunDir + "/boot", Key: "/usr/share/bulkhead/pcr.pub", Cmdline: "/proc/cmdline", Log: "/sys/kernel/security/tpm0/binary_bios_measurements",
		Runtime: runtimeFolder, Firmware: "/sys/firmware/qemu_fw_cfg/by_name", Blocks: "/sys/class/block", Dev: "/dev", Relay: relay,
	})
}

// mapOf finds the open device over a volume's partition, and returns its UUID; the zero value if there is none.
func (l *linux) mapOf(v volume, partition string) (m Map, uuid string) {
	all, _ := os.ReadDir(l.block(""))
	for _, e := range all {
		at := l.block(e.Name())
		if !strings.HasPrefix(e.Name(), "dm-") || attr(at, "dm/name") != vault.MapName(string(v.name)) {
			continue
		}
		if _, err := os.Stat(filepath.Join(at, "slaves", filepath.Base(partition))); err != nil {
			continue
		}
		return Map{Device: filepath.Join(l.dev, e.Name()), Dev: attr(at, "dev"), Size: number(at, "size") * 512}, attr(at, "dm/uuid")
	}
	return Map{}, ""
}

// crypt fills in what is to be known of a volume's encryption.
func (l *linux) crypt(p *Partition) {
	i := volumeOf(p.Partition)
	if i < 0 || p.Device == "" {
		return
	}
	v := volumes[i]
	if isDoomed(p.Partition) { // pods may have it mounted where we see nothing of it
		p.Busy = p.Busy || inUse(p.Device)
	}
	m, uuid := l.mapOf(v, p.Device)
	if p.encrypted() {
		f, err := os.Open(p.Device)
		if err != nil {
			p.LUKS.Unusable = err.Error()
			return
		}
		h := vault.Look(f)
		f.Close()
		if h == nil {
			h = &vault.Header{Unusable: "it is not LUKS2"}
		}
		p.LUKS, p.Why = *h, l.vault.Why(string(v.name))
		if uuid != vault.MapUUID(string(v.name), h.UUID) && p.Attributes&unformatted == 0 {
			m = Map{} // of an earlier volume: opening makes it anew
		}
	}
	if p.Map = m; m.Device != "" {
		if f, err := os.Open(m.Device); err == nil {
			p.Map.Content, _ = probe.Read(f, m.Size)
			f.Close()
		}
	}
}

// volumeOf returns the index of the volume that a partition is, or -1.
func volumeOf(p gpt.Partition) int {
	for i, v := range volumes {
		if v.owns(p) {
			return i
		}
	}
	return -1
}

// dataOf returns where the file system of a step's volume is, once the kernel has its partition in the right place. A locked volume is skipped.
func (l *linux) dataOf(s Step) (gpt.Partition, Map, error) {
	p, k, err := l.inKernel(s)
	if err != nil {
		return p, Map{}, err
	}
	if !s.Encrypted {
		return p, Map{Device: k.Device, Dev: k.Dev, Size: k.KernelSize}, nil
	}
	m, _ := l.mapOf(volumeNamed(s.Volume), k.Device)
	if m.Device == "" {
		return p, m, fmt.Errorf("%w (%s is locked)", reconcile.ErrSkipped, s.Volume)
	}
	return p, m, nil
}

// target returns a step's partition as the vault wants it.
func (l *linux) target(s Step) (gpt.Partition, vault.Target, error) {
	p, k, err := l.inKernel(s)
	return p, vault.Target{Name: string(s.Volume), Device: k.Device, Dev: k.Dev, Size: k.KernelSize}, err
}

// folder opens storaged's own folder on STATE, if a disk's STATE is mounted. The caller closes it soon: an open file keeps PID 1 from unmounting.
func (l *linux) folder(have State) (*os.Root, error) {
	v := volumeNamed(StateVolume)
	for _, d := range have.Disks {
		if p, ok := d.volume(v); ok && have.isMounted(v, p) {
			fd, err := l.openVolume(v, p.data().Dev)
			if err != nil {
				return nil, err
			}
			defer unix.Close(fd)
			return os.OpenRoot(filepath.Join(l.root, v.target, ownFolder))
		}
	}
	return nil, fmt.Errorf("STATE is not mounted")
}

// locks is Do for what concerns encryption.
func (l *linux) locks(ctx context.Context, s Step) error {
	switch s.Op {
	case opCap:
		return l.vault.Cap()
	case opClose:
		return l.close(s.Volume)
	}
	p, t, err := l.target(s)
	if err != nil {
		return err
	}
	switch s.Op {
	case opHeader:
		return l.vault.Repair(t)
	case opGrowMap:
		return l.vault.Resize(t)
	}
	folder := (*os.Root)(nil)
	if s.Volume == VarVolume || s.Op == opOwner || s.Op == opKey {
		have, err := l.Read(ctx)
		if err == nil {
			folder, err = l.folder(have)
		}
		if err != nil {
			return fmt.Errorf("%w (%w)", reconcile.ErrSkipped, err)
		}
		defer folder.Close()
	}
	switch s.Op {
	case opLUKS:
		if p.Attributes&unformatted == 0 {
			return nil // done
		}
		return l.luks(ctx, s, t, folder)
	case opOpen:
		return l.vault.Open(ctx, t, folder)
	case opOwner:
		return l.vault.TakeOwnership(folder)
	case opKey:
		_, _, err := l.vault.Add(ctx, vault.Volumes{State: &t, Folder: folder}, s.Wish)
		return err
	}
	return fmt.Errorf("unknown step %q", s.Op)
}

// close takes the open device of a volume away, when nobody looks at it.
func (l *linux) close(v VolumeName) error {
	l.looks.Lock()
	defer l.looks.Unlock()
	return l.vault.Close(string(v))
}

// luks makes an encrypted volume.
func (l *linux) luks(ctx context.Context, s Step, t vault.Target, folder *os.Root) error {
	o := vault.Format{Target: t}
	for _, k := range s.Keys {
		switch k {
		case vault.TPM:
			o.TPM = true
		case vault.State:
			o.Folder = folder
		}
	}
	if s.Volume == VarVolume {
		have, err := l.Read(ctx)
		if err != nil {
			return err
		}
		o.Others = have.openTargets(StateVolume)
	}
	return l.vault.Format(o)
}

// openTargets returns the encrypted volumes of these names that are open.
func (s State) openTargets(names ...VolumeName) (out []vault.Target) {
	for _, t := range s.targets(true) {
		for _, n := range names {
			if t.Name == string(n) {
				out = append(out, t)
			}
		}
	}
	return out
}

// targets returns the encrypted, formatted volumes of the disk that counts: those that are open, or those that are locked.
func (s State) targets(open bool) (out []vault.Target) {
	home, err := s.home("")
	if home == nil || err != nil {
		return nil
	}
	for _, v := range volumes {
		p, ok := home.volume(v)
		if ok && p.encrypted() && p.Attributes&unformatted == 0 && p.Device != "" && (p.Map.Device != "") == open {
			out = append(out, vault.Target{Name: string(v.name), Device: p.Device, Dev: p.Dev, Size: p.KernelSize})
		}
	}
	return out
}

// tellLocked writes, for trustd, whether STATE is locked: after what opens it without a person was tried.
func (l *linux) tellLocked(have State) error {
	locked, why := false, ""
	for _, t := range have.targets(false) {
		if p, ok := have.partition(StateVolume); ok && t.Name == string(StateVolume) {
			locked, why = p.Why != "" || !have.opens(p.LUKS), have.why(p)
		}
	}
	path := filepath.Join(l.runtime, lockedFile)
	if !locked {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text := strings.Join(strings.Fields(why), " ") + "\n"
	if was, err := os.ReadFile(path); err == nil && string(was) == text {
		return nil
	}
	next := path + ".new" // who reads it finds the whole text
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Chmod(0o444), f.Close(), os.Rename(next, path)) // the process's umask is its own business
}
