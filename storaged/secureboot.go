package storaged

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/storaged/enrol"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// Where a node has the firmware's variables, and the keys that its image was signed for: in the verified root, not on the EFI partition, which
// anybody can write to.
const (
	firmwareVars = "/sys/firmware/efi/efivars"
	firmwareKeys = "/usr/share/bulkhead"
)

// firmware is what enrolling needs of the machine.
type firmware struct {
	vars enrol.Firmware
	keys string
	// esp calls f with each boot loader and kernel on the EFI partition.
	esp func(f func(name string, file *fat.File) error) error
}

// newFirmware looks at the EFI partition as the slots do.
func newFirmware(disk *slots.Linux) firmware {
	return firmware{firmwareVars, firmwareKeys, func(f func(string, *fat.File) error) error {
		part, err := disk.Open("ESP", slots.Read)
		if err != nil {
			return err
		}
		volume, err := fat.Open(part, part.Size())
		if err == nil {
			err = started(volume, f)
		}
		return errors.Join(err, part.Close())
	}}
}

// started calls f with what the firmware starts, and what that starts.
func started(volume *fat.Volume, f func(string, *fat.File) error) error {
	for _, dir := range []string{"EFI/BOOT", "EFI/systemd", "EFI/Linux"} {
		files, err := volume.List(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		for _, i := range files {
			if i.Dir || !strings.HasSuffix(strings.ToLower(i.Name), ".efi") {
				continue
			}
			file, err := volume.Open(dir, i.Name)
			if err == nil {
				err = f(dir+"/"+i.Name, file)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// secureBootServer is for administrators.
type secureBootServer struct {
	storagev1.UnimplementedSecureBootServer
	d  *Daemon
	fw firmware
}

// EnrollKeys refuses all that would leave a machine which does not start any more, or whose disk stays locked without anybody expecting it.
func (s secureBootServer) EnrollKeys(ctx context.Context, r *storagev1.EnrollKeysRequest) (*storagev1.EnrollKeysResponse, error) {
	is, err := s.fw.vars.State()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errs.New(errs.Precondition, "this machine was not started by UEFI: it has no Secure Boot")
	case err != nil:
		return nil, err
	case !is.Setup && is.Secure:
		return nil, errs.New(errs.Precondition, "Secure Boot is on: the firmware has keys already")
	case !is.Setup:
		return nil, errs.New(errs.Precondition, "the firmware has keys and is not in setup mode: restart the machine if they were enrolled just now; else delete all Secure Boot keys in the "+
			"firmware's setup, or switch Secure Boot on there")
	}
	keys, err := enrol.ReadKeys(s.fw.keys)
	if err != nil {
		return nil, err
	}
	if err := s.covered(keys); err != nil {
		return nil, err
	}
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return nil, err
	}
	locks := locksWithKeys(have)
	if err := mayEnrol(locks, r.GetAllowLocked()); err != nil {
		return nil, err
	}
	if err := s.fw.vars.Enrol(keys); err != nil {
		return nil, errs.New(errs.Precondition, "%w", err)
	}
	s.d.log.Info("Secure Boot keys enrolled")
	return &storagev1.EnrollKeysResponse{Locks: locks}, nil
}

// locksWithKeys reports whether STATE opens by the TPM and nothing else: then it does not, once the firmware has other keys.
func locksWithKeys(have State) bool {
	p, ok := have.partition(StateVolume)
	return ok && p.encrypted() && p.LUKS.Has(vault.TPM) && !p.LUKS.Has(vault.KeyFile) && !p.LUKS.Has(vault.Service)
}

func mayEnrol(locks, allowed bool) error {
	if !locks || allowed {
		return nil
	}
	return errs.New(errs.Precondition, "the TPM's key of STATE is for the firmware as it is now: after this, the next start needs the recovery key (bhctl unlock), and then "+
		"the TPM's key is to be rotated (bhctl storage keys rotate); allow a locked STATE if the recovery key is at hand; nothing was changed")
}

// covered wants all that starts, or may, to be signed for the keys.
func (s secureBootServer) covered(keys enrol.Keys) error {
	any := false
	err := s.fw.esp(func(name string, file *fat.File) error {
		any = true
		ok, err := keys.Covers(file, file.Size)
		if err != nil {
			return errs.New(errs.Precondition, "%s on the EFI partition: %w; nothing was changed", name, err)
		}
		if !ok {
			return errs.New(errs.Precondition, "%s on the EFI partition is not signed by the key of this image: the firmware would not start it; nothing was changed", name)
		}
		return nil
	})
	if err == nil && !any {
		err = errs.New(errs.Precondition, "there is nothing on the EFI partition that a firmware with keys could start; nothing was changed")
	}
	return err
}
