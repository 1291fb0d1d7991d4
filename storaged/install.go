package storaged

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/storaged/install"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

// beganFile, in the runtime folder, says that this boot has copied something to a disk.
const beganFile = "installing"

// loaderVariable is systemd-boot's word on the EFI partition that it was started from: its unique GUID, as text.
const loaderVariable = "LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"

// Progress is how far a step of an installation is. The zero value: none runs.
type Progress struct {
	Step        string
	Disk        string
	Done, Total int64     // bytes
	Since, At   time.Time // when it began, and when this was so
}

// bootESP returns the GUID of the EFI partition that the firmware started this machine from.
func (l *linux) bootESP() (gpt.GUID, error) {
	b, err := os.ReadFile(filepath.Join(l.vars, loaderVariable))
	if err != nil || len(b) < 4 {
		return gpt.GUID{}, errors.New("this machine was not started by UEFI and systemd-boot: there is nothing to install that could be started from a disk")
	}
	var units []uint16
	for b = b[4:]; len(b) > 1 && (b[0] != 0 || b[1] != 0); b = b[2:] { // behind the variable's attributes
		units = append(units, binary.LittleEndian.Uint16(b))
	}
	return gpt.ParseGUID(strings.ToLower(string(utf16.Decode(units))))
}

// installation looks at what an installation needs.
func (l *linux) installation(disks []Disk) (i Installation) {
	_, err := os.Stat(filepath.Join(l.runtime, beganFile))
	i.Began = err == nil
	key, ok := l.vault.RecoveryKey()
	key.Wipe()
	i.Recovery = ok
	l.mu.Lock()
	i.Progress = l.progress
	l.mu.Unlock()
	if _, err := l.bootPartition(disks); err != nil {
		i.NoBoot = err.Error()
	}
	return i
}

// bootPartition returns the EFI partition that the machine was started from.
func (l *linux) bootPartition(disks []Disk) (Partition, error) {
	guid, err := l.loader()
	if err != nil {
		return Partition{}, err
	}
	for _, d := range disks {
		for _, p := range d.Partitions {
			if d.HasTable && p.GUID == guid && p.Device != "" {
				return p, nil
			}
		}
	}
	return Partition{}, fmt.Errorf("no disk has the EFI partition %s that the machine was started from: it was taken out, or is a CD", guid)
}

// lay adds the partitions of the system, ESP and root with the mark that they hold nothing, and tells the kernel.
func (l *linux) lay(s Step) error {
	var parts []gpt.Partition
	err := l.table(s.Disk, func(f *os.File, t *gpt.Table) error {
		if whole, _ := (Disk{HasTable: true, Partitions: wrap(t.Partitions)}).laid(); whole {
			parts = t.Partitions
			return nil
		}
		if len(t.Partitions) > 0 {
			return errors.New("there are partitions meanwhile")
		}
		parts = layout.Partitions(func(string) gpt.GUID { return newGUID() })
		for i, p := range parts {
			r, err := probe.Read(io.NewSectionReader(f, p.Start(), p.Size()), p.Size())
			if err != nil {
				return err
			}
			if r.Data() && !s.Wipe {
				return fmt.Errorf("found %s at %s of the disk, in the free space, which would be lost; set Storage.wipe to true to allow that", r, sizeText(p.Start()))
			}
			if p.Name == layout.ESP || p.Name == layout.RootA {
				parts[i].Attributes |= unformatted
			}
		}
		// An earlier installation's boot files may lie in just this place: no firmware must find them.
		if _, err := f.WriteAt(make([]byte, mib), parts[0].Start()); err != nil {
			return err
		}
		t.Partitions = parts
		return f.Sync()
	})
	if err != nil {
		return err
	}
	if err := l.begin(); err != nil {
		return err
	}
	for _, p := range parts {
		if _, any := (Disk{HasTable: true, Partitions: wrap([]gpt.Partition{p})}).laid(); any {
			if err := l.tellKernel(s.Disk, p.Number, p.Start(), p.Size()); err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
		}
	}
	return nil
}

func wrap(all []gpt.Partition) (out []Partition) {
	for _, p := range all {
		out = append(out, Partition{Partition: p})
	}
	return out
}

// begin notes that this boot copies the system to a disk.
func (l *linux) begin() error {
	f, err := os.OpenFile(filepath.Join(l.runtime, beganFile), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// A system is what an installation copies from and to.
type system struct {
	hash       bundle.Digest
	disk       Disk // the target
	root, tree Partition
	disks      []Disk
}

// system looks at the medium and at a disk that is being installed to.
func (l *linux) system(ctx context.Context, s Step) (y system, err error) {
	have, err := l.Read(ctx)
	if err != nil {
		return y, err
	}
	if y.hash, err = slots.Running(attrLong(filepath.Join(l.proc, "cmdline"))); err != nil {
		return y, err
	}
	y.disks = have.Disks
	for _, d := range have.Disks {
		if d.Device == s.Disk {
			y.disk = d
		}
		for _, p := range d.Partitions {
			switch {
			case !d.System || p.Device == "":
			case p.GUID == gpt.GUID(y.hash[:16]):
				y.root = p
			case p.GUID == gpt.GUID(y.hash[16:]):
				y.tree = p
			}
		}
	}
	if y.disk.System || !y.disk.installing() {
		return y, fmt.Errorf("no installation was begun on %s", s.Disk)
	}
	return y, l.begin()
}

// open opens a partition.
func open(p Partition, mode slots.Mode) (slots.Part, error) {
	if p.Device == "" {
		return nil, fmt.Errorf("the kernel does not know the partition %s", p.Name)
	}
	return slots.OpenBlock(p.Device, p.KernelSize, mode)
}

// opened opens partitions, all of them or none.
func opened(mode slots.Mode, parts ...Partition) (out []slots.Part, err error) {
	for _, p := range parts {
		o, err := open(p, mode)
		if err != nil {
			return nil, errors.Join(err, closed(out))
		}
		out = append(out, o)
	}
	return out, nil
}

func closed(all []slots.Part) (err error) {
	for _, p := range all {
		err = errors.Join(err, p.Close())
	}
	return err
}

// installRoot copies the root and reads it back. Only then the mark goes.
func (l *linux) installRoot(ctx context.Context, s Step) error {
	y, err := l.system(ctx, s)
	if err != nil {
		return err
	}
	to := []Partition{y.disk.named(layout.RootA), y.disk.named(layout.TreeA)}
	if to[0].Attributes&unformatted == 0 {
		return nil // done
	}
	medium, err := opened(slots.Read, y.root, y.tree)
	if err != nil {
		return fmt.Errorf("the medium: %w", err)
	}
	defer closed(medium)
	parts, err := opened(slots.Write, to...)
	if err != nil {
		return err
	}
	err = install.Root(ctx, medium[0], medium[1], y.hash, parts[0], parts[1], l.report(s, "copy the root"))
	if err := errors.Join(err, closed(parts)); err != nil {
		return err
	}
	if parts, err = opened(slots.Direct, to...); err != nil {
		return err
	}
	err = install.Verify(ctx, parts[0], parts[1], y.hash, l.report(s, "read the root back"))
	if err := errors.Join(err, closed(parts)); err != nil {
		return fmt.Errorf("what was written is not what was read, the disk does not keep it: %w", err)
	}
	return l.mark(s.Disk, layout.RootA, gpt.GUID{}, gpt.GUID{})
}

// installBoot copies the boot files and makes the disk one that a firmware starts.
func (l *linux) installBoot(ctx context.Context, s Step) error {
	y, err := l.system(ctx, s)
	if err != nil {
		return err
	}
	if y.disk.named(layout.RootA).Attributes&unformatted != 0 {
		return errors.New("the root is not there yet")
	}
	from, err := l.bootPartition(y.disks)
	if err != nil {
		return errs.New(errs.Precondition, "%w", err)
	}
	esp := y.disk.named(layout.ESP)
	medium, err := open(from, slots.Read)
	if err != nil {
		return fmt.Errorf("the medium: %w", err)
	}
	defer medium.Close()
	part, err := open(esp, slots.Write)
	if err != nil {
		return err
	}
	b := install.Boot{Medium: medium, ESP: part, Hash: y.hash, Serial: binary.BigEndian.Uint32(esp.GUID[:]),
		Again: func() (install.Source, func() error, error) {
			p, err := open(esp, slots.Direct)
			if err != nil {
				return nil, nil, err
			}
			return p, p.Close, nil
		}}
	err = b.Copy(ctx, l.report(s, "copy the boot files"))
	if err == nil { // from here on it takes a moment
		err = l.mark(s.Disk, "", gpt.GUID(y.hash[:16]), gpt.GUID(y.hash[16:]))
	}
	if err == nil {
		err = b.Finish(ctx)
	}
	if err := errors.Join(err, part.Close()); err != nil {
		return err
	}
	if err := install.Prefer(l.vars, esp.Partition); err != nil { // without it a firmware starts what it finds first
		l.log.Warn("boot entry not written", "disk", s.Disk, "err", err.Error())
	}
	return l.mark(s.Disk, layout.ESP, gpt.GUID{}, gpt.GUID{})
}

// mark takes the mark away from a partition, and gives the root's partitions the GUIDs that spell its hash; what is zero stays.
func (l *linux) mark(disk, whole string, root, tree gpt.GUID) error {
	l.setProgress(Progress{})
	return l.table(disk, func(_ *os.File, t *gpt.Table) error {
		for i := range t.Partitions {
			p := &t.Partitions[i]
			switch {
			case p.Name == whole && whole != "":
				p.Attributes &^= unformatted
			case p.Name == layout.RootA && root != gpt.GUID{}:
				p.GUID = root
			case p.Name == layout.TreeA && tree != gpt.GUID{}:
				p.GUID = tree
			}
		}
		return nil
	})
}

// report returns what keeps the progress of a part of a step.
func (l *linux) report(s Step, what string) install.Report {
	p := Progress{Step: what, Disk: s.Disk, Since: time.Now()}
	told := time.Time{}
	return func(done, total int64) {
		p.Done, p.Total, p.At = done, total, time.Now()
		l.setProgress(p)
		if l.news != nil && p.At.Sub(told) >= time.Second {
			told = p.At
			l.news(p)
		}
	}
}

func (l *linux) setProgress(p Progress) {
	l.mu.Lock()
	l.progress = p
	l.mu.Unlock()
}
