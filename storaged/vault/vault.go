// Package vault makes encrypted volumes, opens them, and changes what opens them. It brings together the format (luks), the kernel
// (dm), and where keys come from: the TPM, files, a server, people.
//
// It decides nothing about disks: storaged's plan says which partition is to be formatted or opened. It keeps no key of its own: an open volume's
// is read back from the kernel when it is needed. The one exception is the recovery key, between its making and its being shown.
package vault

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// Kind says what opens a keyslot.
type Kind string

// The kinds there are; storage.v1.Key has the same.
const (
	TPM        Kind = "tpm"
	Recovery   Kind = "recovery"
	Passphrase Kind = "passphrase"
	KeyFile    Kind = "keyFile"
	Service    Kind = "kms"
	State      Kind = "state" // a file on STATE: VAR's
	Other      Kind = "other" // somebody else's
)

// Automatic reports whether a key of this kind opens a volume without a person.
func (k Kind) Automatic() bool { return k == TPM || k == KeyFile || k == Service || k == State }

// Key is a keyslot, for people.
type Key struct {
	Slot   int
	Kind   Kind
	Detail string
}

// Header is what a partition's LUKS2 header says.
type Header struct {
	UUID       string
	Offset     int64 // of the data, in bytes
	SectorSize int
	Keys       []Key // in the order of slots
	// Repair is what is wrong with one of its copies, Unusable why none can be used; "" if nothing.
	Repair, Unusable string
}

// Has reports whether there is a key of this kind.
func (h Header) Has(k Kind) bool {
	return slices.ContainsFunc(h.Keys, func(x Key) bool { return x.Kind == k })
}

// Target is an encrypted partition, or one that is to be.
type Target struct {
	Name   string // of the volume: "STATE"
	Device string // "/dev/vda5"
	Dev    string // "254:5"
	Size   int64  // bytes, as the kernel has it
}

// MapName is the device-mapper name of a volume's open device.
func MapName(volume string) string { return "bulkhead-" + volume }

// MapUUID is the device-mapper UUID of the same, in cryptsetup's form.
func MapUUID(volume, uuid string) string {
	return "CRYPT-LUKS2-" + strings.ReplaceAll(uuid, "-", "") + "-" + MapName(volume)
}

// Mapper is the part of device-mapper that is used; *dm.Control has it.
type Mapper interface {
	Create(name, uuid string, table dm.Crypt) (dm.Status, error)
	Reload(name string, table dm.Crypt) error
	Remove(name string) error
	Status(name string) (dm.Status, error)
	Table(name string) (dm.Crypt, error)
	io.Closer
}

// Config says where things are. All but Relay are required.
type Config struct {
	Mapper   func() (Mapper, error)   // opens device-mapper
	TPM      func() (*tpm.TPM, error) // opens the TPM; os.ErrNotExist: there is none
	Boot     string                   // folder with what the stub passed on: /run/bulkhead/boot
	Key      string                   // the root's own copy of the key of PCR policies; it need not exist
	Cmdline  string                   // /proc/cmdline
	Log      string                   // the firmware's log of measurements; it need not exist
	Runtime  string                   // folder that lives as long as the machine runs: /run/bulkhead/storaged
	Firmware string                   // fw_cfg's files: /sys/firmware/qemu_fw_cfg/by_name
	Blocks   string                   // /sys/class/block
	Dev      string                   // /dev
	Relay    Relay                    // to key services; nil: they cannot be reached
}

// Vault is made by New. It may be used by several goroutines.
type Vault struct {
	cfg   Config
	image tpm.Image
	noPCR string // why image has no signed policy; "" if it has

	change sync.Mutex // serialises changes of headers and maps

	mu       sync.Mutex
	why      map[string]string // guarded by mu; why a volume did not open, by its name
	recovery secret.Bytes      // guarded by mu; until somebody has acknowledged it
	owned    bool              // guarded by mu; once the TPM said so
	epoch    int               // guarded by mu; -1 until the TPM said it
}

// New reads what is known of the image; it changes nothing.
func New(cfg Config) *Vault {
	v := &Vault{cfg: cfg, why: map[string]string{}, epoch: -1}
	v.readImage()
	return v
}

// Look reads a partition's header. It returns nil if there is none.
func Look(r io.ReaderAt) *Header {
	h, health, err := luks.Read(r)
	if errors.Is(err, luks.ErrNone) {
		return nil
	}
	if err != nil {
		return &Header{Unusable: err.Error()}
	}
	out := &Header{UUID: h.UUID, Offset: h.Segment.Offset, SectorSize: h.Segment.SectorSize, Keys: keys(h)}
	switch {
	case health.Primary != nil:
		out.Repair = "first copy: " + health.Primary.Error()
	case health.Secondary != nil:
		out.Repair = "second copy: " + health.Secondary.Error()
	}
	return out
}

// keys lists the keyslots with what their tokens say.
func keys(h *luks.Header) []Key {
	var out []Key
	for n := range h.Keyslots {
		k := Key{Slot: n, Kind: Other}
		for _, t := range h.Tokens {
			if slices.Contains(t.Keyslots, n) && kindOf(t) != Other {
				k.Kind, k.Detail = kindOf(t), detail(t)
			}
		}
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b Key) int { return a.Slot - b.Slot })
	return out
}

// ID names a key: "STATE-0".
func ID(volume string, slot int) string { return volume + "-" + strconv.Itoa(slot) }

// ParseID reads it. Only STATE and VAR have keys.
func ParseID(id string) (volume string, slot int, err error) {
	volume, number, ok := strings.Cut(id, "-")
	slot, err = strconv.Atoi(number)
	if !ok || volume != "STATE" && volume != "VAR" || err != nil || slot < 0 || slot >= luks.MaxKeyslots || ID(volume, slot) != id {
		return "", 0, fmt.Errorf("key %.64q: a key's id is that of its volume, STATE or VAR, and a number, like \"STATE-0\"; bhctl storage keys list shows them", id)
	}
	return volume, slot, nil
}

// Why says why a volume did not open when it was last tried; "" if it was not, or did. Of STATE it is known over restarts of the process.
func (v *Vault) Why(volume string) string {
	v.mu.Lock()
	why := v.why[volume]
	v.mu.Unlock()
	if why == "" && volume == "STATE" {
		return v.lastWhy()
	}
	return why
}

func (v *Vault) setWhy(volume, text string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.why[volume] = text; text == "" {
		delete(v.why, volume)
	}
}

// device opens a partition to read and change its header. It need not be closed to the data's device-mapper device: that lies behind the header.
func device(t Target) (*os.File, error) { return os.OpenFile(t.Device, os.O_RDWR, 0) }

// header opens a partition and reads its header. The caller closes the file.
func header(t Target) (*os.File, *luks.Header, error) {
	f, err := device(t)
	if err != nil {
		return nil, nil, err
	}
	h, _, err := luks.Read(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, h, nil
}

// opened opens a partition whose volume is open, and returns its header and volume key. The caller closes the one and wipes the other.
func (v *Vault) opened(t Target) (*os.File, *luks.Header, secret.Bytes, error) {
	f, h, err := header(t)
	if err != nil {
		return nil, nil, secret.Bytes{}, err
	}
	m, err := v.cfg.Mapper()
	if err == nil {
		var table dm.Crypt
		if table, err = m.Table(MapName(t.Name)); err == nil {
			if h.Is(table.Key) {
				return f, h, table.Key, m.Close()
			}
			table.Key.Wipe()
			err = fmt.Errorf("the open device has another key than %s", t.Device)
		}
		err = errors.Join(err, m.Close())
	}
	return nil, nil, secret.Bytes{}, errors.Join(fmt.Errorf("%s is not open: %w", t.Name, err), f.Close())
}
