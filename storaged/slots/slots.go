// Package slots keeps two versions of the system on the disk: it says which one runs, fills the other, and lets systemd-boot try it.
//
// It belongs to storaged, which alone may write to disks. It believes nothing that updated brings: the manifest's signature is verified
// here again, every chunk is checked against the manifest, and a slot is read back from the disk, whole, through its hash tree before
// anything starts it. What is decided is in machine.go and pure; how far an upgrade has come can be read from the disk, and nothing else
// remembers it.
package slots

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/fat"
)

// A Part is a partition.
type Part interface {
	fat.Device
	io.Closer
	Size() int64 // bytes
}

// How a partition is opened.
const (
	Read   Mode = iota
	Write       // nobody else may have it
	Direct      // for reading what the disk has, not what memory remembers
)

// Mode is how a partition is opened.
type Mode int

// PartName is the name of a partition in the table.
type PartName string

const espName PartName = "ESP"

func rootName(slot int) PartName { return PartName("ROOT-" + Label(slot)) }
func treeName(slot int) PartName { return PartName("VERITY-" + Label(slot)) }

// Layout is what the partition table and the kernel's command line say.
type Layout struct {
	Running bundle.Digest // root hash
	Epoch   int           // of the running image; 0 if it names none
	Slots   [2]bundle.Digest
	// Root and Tree are the sizes of the partitions, in bytes.
	Root, Tree [2]int64
}

// A Disk is the system disk. Its methods may be called by one goroutine at a time.
type Disk interface {
	// Look reads the table. The error says so if the machine does not start from this disk by UEFI.
	Look(context.Context) (Layout, error)
	Open(name PartName, mode Mode) (Part, error)
	// Label gives a slot's partitions the GUIDs that spell a root hash, durably.
	Label(slot int, root bundle.Digest) error
}

// Epochs is where the lowest epoch is kept that still gets the disk's keys: the TPM.
type Epochs interface {
	// Floor returns it, 0 if nothing was raised yet. kept is false if there is no TPM: then there is no floor.
	Floor(context.Context) (floor int, kept bool, err error)
	// Raise makes it at least that epoch. It cannot be lowered again. Without a TPM it does nothing.
	Raise(ctx context.Context, epoch int) error
}

// NoEpochs is a machine without a TPM.
type NoEpochs struct{}

// Floor returns that there is none.
func (NoEpochs) Floor(context.Context) (int, bool, error) { return 0, false, nil }

// Raise does nothing.
func (NoEpochs) Raise(context.Context, int) error { return nil }

// Config is fixed for the life of the process; all fields are required.
type Config struct {
	Disk Disk
	// Keys returns the release keys that this image trusts.
	Keys         func() (bundle.Keys, error)
	Epochs       Epochs
	Architecture string // as Go writes it
	Version      string // that runs, without "v"
	Log          *slog.Logger
}

// Store is the two slots. Make it with New. It is safe for concurrent use; calls follow one another.
type Store struct {
	cfg Config

	mu      sync.Mutex
	session *session // guarded by mu; nil if no upgrade is being written
	last    uint64   // guarded by mu; number of the last session
}

// New returns a store that has touched nothing yet.
func New(cfg Config) *Store { return &Store{cfg: cfg} }

// Report is what Get returns.
type Report struct {
	Slots [2]View
	// Epoch is that of the running image, Floor the lowest that is still accepted; 0 where there is none. Kept says that a TPM keeps the floor.
	Epoch, Floor int
	Kept         bool
}

// Get looks at the disk.
func (s *Store) Get(ctx context.Context) (Report, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.report(ctx)
}

// report looks at the disk. mu is held.
func (s *Store) report(ctx context.Context) (Report, error) {
	state, layout, err := s.look(ctx)
	if err != nil {
		return Report{}, err
	}
	floor, kept, err := s.cfg.Epochs.Floor(ctx)
	return Report{state.View(), layout.Epoch, floor, kept}, err
}

// look reads the whole state. mu is held.
func (s *Store) look(ctx context.Context) (State, Layout, error) {
	layout, err := s.cfg.Disk.Look(ctx)
	if err != nil {
		return State{}, Layout{}, err
	}
	if s.session != nil { // its volume is ahead of the disk's
		state, err := readState(s.session.volume, layout)
		return state, layout, err
	}
	part, volume, err := s.openESP(Read)
	if err != nil {
		return State{}, Layout{}, err
	}
	defer part.Close()
	state, err := readState(volume, layout)
	return state, layout, err
}

func (s *Store) openESP(mode Mode) (Part, *fat.Volume, error) {
	part, err := s.cfg.Disk.Open(espName, mode)
	if err != nil {
		return nil, nil, err
	}
	volume, err := fat.Open(part, part.Size())
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("EFI partition: %w", err), part.Close())
	}
	return part, volume, nil
}

// readState reads what kernels there are. One that cannot be read is in the list without a root: nothing starts it, so nothing is lost with it.
func readState(v *fat.Volume, layout Layout) (State, error) {
	state := State{Running: layout.Running, Slots: layout.Slots}
	files, err := v.List(kernelDir)
	if err != nil {
		return State{}, fmt.Errorf("EFI partition: %w", err)
	}
	for _, f := range files {
		name, ours := ParseName(f.Name)
		if !ours || f.Dir {
			continue
		}
		e := Entry{File: f.Name, Name: name}
		if file, err := v.Open(kernelDir, f.Name); err == nil {
			if k, err := readKernel(file, file.Size); err == nil {
				e.Root, e.Epoch = k.root, k.epoch
			}
		}
		state.Entries = append(state.Entries, e)
	}
	return state, nil
}

// renames carries out steps that only rename. mu is held and there is no session.
func (s *Store) renames(steps []Step) error {
	if len(steps) == 0 {
		return nil
	}
	part, volume, err := s.openESP(Write)
	if err != nil {
		return err
	}
	defer part.Close()
	if err := volume.Reclaim(preferred); err != nil {
		return fmt.Errorf("EFI partition: %w", err)
	}
	for _, step := range steps {
		if err := volume.Rename(kernelDir, step.File, step.To); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
		s.cfg.Log.Info("step done", "step", step.String())
	}
	return nil
}

// MarkGood ends the trial of the running version, and then raises the epoch to its own. Doing it again is fine. override is a person's
// word against an earlier rollback.
func (s *Store) MarkGood(ctx context.Context, override bool) (Report, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state, layout, err := s.look(ctx)
	if err != nil {
		return Report{}, err
	}
	steps, err := planMarkGood(state, override)
	if err != nil {
		return Report{}, err
	}
	if len(steps) > 0 {
		s.end() // none can be open: planBegin wants a good version
	}
	if err := s.renames(steps); err != nil {
		return Report{}, err
	}
	if layout.Epoch > 0 {
		if err := s.cfg.Epochs.Raise(ctx, layout.Epoch); err != nil {
			return Report{}, fmt.Errorf("raise the epoch to %d: %w", layout.Epoch, err)
		}
	}
	return s.report(ctx)
}

// Rollback makes the next boot start the other version, or cancels an upgrade that was not started yet. It returns the version that the
// next boot starts, and whether the machine must be restarted for it.
func (s *Store) Rollback(ctx context.Context) (version string, restart bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
	state, layout, err := s.look(ctx)
	if err != nil {
		return "", false, err
	}
	floor, _, err := s.cfg.Epochs.Floor(ctx)
	if err != nil {
		return "", false, err
	}
	steps, to, err := planRollback(state, floor)
	if err != nil {
		return "", false, err
	}
	running, slot, err := state.running()
	if err != nil {
		return "", false, err
	}
	restart = to.Version != running.Name.Version || to.Sequence != running.Name.Sequence
	if restart {
		if err := s.verify(ctx, 1-slot, layout, layout.Slots[1-slot], nil); err != nil {
			return "", false, errs.New(errs.Precondition, "slot %s is damaged: %w; nothing was changed", Label(1-slot), err)
		}
	}
	return to.Version, restart, s.renames(steps)
}
