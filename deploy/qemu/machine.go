// Package qemu runs Bulkhead machines in QEMU: for "bhctl up" and for tests. A machine is a folder that holds its
// disk, its kernel and what was chosen for it; it outlives the program that started it and needs no privilege.
//
// It knows how to make a machine, power it on, cut its power and look at its console. It knows nothing of what runs
// inside: that is asked through the node's API.
package qemu

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// Names of the files in a machine's folder.
const (
	ConsoleFile = "console.log" // what the machine wrote to its serial console since it was powered on

	diskFile     = "disk.raw"
	configFile   = "machine.json"
	pidFile      = "qemu.pid"
	qmpSocket    = "qmp.sock"
	ClaimKeyFile = "claim-key" // what the node is claimed with, if anything
	LANSocket    = "lan.sock"  // where the switch of the machine's LAN plugs in

	mediumFile = "medium.iso" // an installation medium, in the machine's folder as in an image's, where it is called isoFile
	isoFile    = "bulkhead.iso"

	bootFile = "vmlinux" // made from the vmlinuz of the image
)

// kernelFiles are copied from the image, so that building another image does not change this machine.
var kernelFiles = []string{"vmlinuz", "initramfs.cpio", "cmdline"}

// A Machine is everything that is chosen for one. New fills in what a person should not have to choose.
type Machine struct {
	Name     string    `json:"name"`
	Dir      string    `json:"-"`                  // its folder, absolute
	UUID     string    `json:"uuid"`               // as the guest's firmware tells it
	Memory   int       `json:"memory"`             // in MiB
	CPUs     int       `json:"cpus"`               //
	DiskSize int64     `json:"disk_size"`          // in bytes
	Forwards []Forward `json:"forwards,omitempty"` //
	Accel    string    `json:"accel,omitempty"`    // "kvm", "tcg", or "" for what works on this host
	Append   string    `json:"append,omitempty"`   // more words for the kernel command line
	// Firmware is "" to start the image's kernel directly, or UEFI to boot the disk. SecureBoot needs UEFI.
	Firmware   string `json:"firmware,omitempty"`
	SecureBoot bool   `json:"secure_boot,omitempty"` // only what the image's keys have signed is started
	TPM        bool   `json:"tpm,omitempty"`         // a TPM 2.0 in software, kept with the machine

	// Medium says that the machine has an installation medium attached, as a disk that cannot be written, and at first an empty disk. It needs UEFI.
	Medium bool `json:"medium,omitempty"`

	// LAN names a private network between machines: those with the same name have a second NIC, and a switch (package lan) that somebody has to run carries
	// their frames. "": none. LANAddress is what the switch gives the machine by DHCP, an IPv4 address with the length of the network's prefix.
	LAN        string       `json:"lan,omitempty"`
	LANAddress netip.Prefix `json:"lan_address,omitzero"`

	// Slow is how many times slower than the host's the machine's clocks run, 2 to 10, since SlowSince, when they had the same time: then an emulated machine has as many times more
	// of the host's processors for each of its own seconds. 0: they run as the host's. It needs software emulation and libfaketime, and the kernel to be started directly.
	Slow      int       `json:"slow,omitempty"`
	SlowSince time.Time `json:"slow_since,omitzero"`

	Isolated bool `json:"isolated,omitempty"` // the guest reaches nothing; forwards still work
	Durable  bool `json:"durable,omitempty"`  // the disk survives a crash of the host, and is slower
	// Record is a file in the machine's folder that is to get every write and flush of the disk, in the form of Linux' dm-log-writes; see
	// internal/powercut. "" records nothing. It must not be there yet: a machine is recorded once, from power on to power off, resets included.
	Record string   `json:"record,omitempty"`
	Extra  []string `json:"extra,omitempty"` // more arguments for QEMU, behind all others
}

// A Forward leads a TCP port of 127.0.0.1 to the guest.
type Forward struct {
	Name  string `json:"name"`  // for people: "api"
	Host  int    `json:"host"`  // 0: one that is free when the machine starts, which is then kept
	Guest int    `json:"guest"` //
	Flag  string `json:"flag"`  // what a person uses to choose another: "--api-port"
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// Home returns the folder of all machines: $BULKHEAD_MACHINES, or bulkhead/machines in the user's state folder.
func Home() (string, error) {
	if d := os.Getenv("BULKHEAD_MACHINES"); d != "" {
		return filepath.Abs(d)
	}
	if d := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "bulkhead", "machines"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("state folder: %w; set BULKHEAD_MACHINES", err)
	}
	return filepath.Join(home, ".local", "state", "bulkhead", "machines"), nil
}

// New returns a machine of that name with the usual choices. Nothing is made before Create.
func New(name string) (Machine, error) {
	home, err := Home()
	if err != nil {
		return Machine{}, err
	}
	m := Machine{Name: name, Dir: filepath.Join(home, name), UUID: newUUID(), Memory: 4096, CPUs: 2, DiskSize: 8 << 30}
	return m, m.Validate()
}

// Load returns the machine of that name. The error is fs.ErrNotExist if there is none.
func Load(name string) (Machine, error) {
	m, err := New(name)
	if err != nil {
		return m, err
	}
	dir := m.Dir
	text, err := os.ReadFile(filepath.Join(dir, configFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, fmt.Errorf("there is no machine %q: %w", name, fs.ErrNotExist)
	} else if err != nil {
		return m, err
	}
	m = Machine{Dir: dir}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%s: %w", filepath.Join(dir, configFile), err)
	}
	return m, m.Validate()
}

// List returns the names of all machines, in order.
func List() ([]string, error) {
	home, err := Home()
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(filepath.Join(home, "*", configFile))
	var names []string
	for _, f := range found {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names, err
}

// Validate says what is wrong with the choices.
func (m Machine) Validate() error {
	switch {
	case !nameForm.MatchString(m.Name):
		return fmt.Errorf("machine name %q: want 1 to 32 small letters, digits and dashes", m.Name)
	case !filepath.IsAbs(m.Dir):
		return fmt.Errorf("machine %s: folder %q is not absolute", m.Name, m.Dir)
	case m.Memory < 256:
		return fmt.Errorf("machine %s: memory: %d MiB is below 256", m.Name, m.Memory)
	case m.CPUs < 1 || m.CPUs > 255:
		return fmt.Errorf("machine %s: cpus: %d is not in 1 to 255", m.Name, m.CPUs)
	case m.DiskSize < 1<<30:
		return fmt.Errorf("machine %s: disk: %d bytes is below 1 GiB", m.Name, m.DiskSize)
	case m.Firmware != "" && m.Firmware != UEFI:
		return fmt.Errorf("machine %s: firmware %q: want uefi, or nothing to start the kernel directly", m.Name, m.Firmware)
	case m.SecureBoot && m.Firmware != UEFI:
		return fmt.Errorf("machine %s: secure boot is a matter of the firmware uefi", m.Name)
	case m.Medium && m.Firmware != UEFI:
		return fmt.Errorf("machine %s: an installation medium is started by the firmware uefi", m.Name)
	case m.Append != "" && m.Firmware == UEFI:
		return fmt.Errorf("machine %s: append: with the firmware uefi the kernel's command line is part of the signed image", m.Name)
	case m.Slow != 0 && (m.Slow < 2 || m.Slow > maxSlow):
		return fmt.Errorf("machine %s: slow clocks: %d is not in 2 to %d", m.Name, m.Slow, maxSlow)
	case m.Slow != 0 && m.Firmware == UEFI:
		return fmt.Errorf("machine %s: slow clocks: with the firmware uefi nobody tells the kernel how fast its counter counts", m.Name)
	case (m.Slow != 0) == m.SlowSince.IsZero():
		return fmt.Errorf("machine %s: slow clocks: %d times since %v; want both or none", m.Name, m.Slow, m.SlowSince)
	case m.Record != filepath.Base(m.Record) && m.Record != "":
		return fmt.Errorf("machine %s: record: %q is not the name of a file in its folder", m.Name, m.Record)
	case m.Accel != "" && m.Accel != accelKVM && m.Accel != accelTCG:
		return fmt.Errorf("machine %s: accelerator %q: want kvm or tcg", m.Name, m.Accel)
	case m.LAN != "" && !nameForm.MatchString(m.LAN):
		return fmt.Errorf("machine %s: LAN %q: want 1 to 32 small letters, digits and dashes", m.Name, m.LAN)
	case m.LANAddress.IsValid() && (m.LAN == "" || !m.LANAddress.Addr().Is4()):
		return fmt.Errorf("machine %s: LAN address %s: want one of IPv4, and a LAN", m.Name, m.LANAddress)
	}
	for _, f := range m.Forwards {
		if f.Host < 0 || f.Host > 65535 || f.Guest < 1 || f.Guest > 65535 {
			return fmt.Errorf("machine %s: forward %s: %d to %d are not ports", m.Name, f.Name, f.Host, f.Guest)
		}
	}
	return nil
}

// Create makes the machine's folder from the image in imageDir. claimKey, if any, is what the node is claimed with;
// the guest reads it from its firmware. The error is fs.ErrExist if there is a machine of that name.
func (m Machine) Create(imageDir string, claimKey []byte) (err error) {
	if err := m.Validate(); err != nil {
		return err
	}
	files := append([]string{diskFile}, kernelFiles...)
	if m.SecureBoot {
		files = append(files, certificates...)
	}
	if m.Medium {
		files[0] = isoFile
	}
	for _, name := range files {
		if _, err := os.Stat(filepath.Join(imageDir, name)); err != nil {
			return fmt.Errorf("%w: \"make image\" makes it (an ISO: \"make dist\")", err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(m.Dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(m.Dir, 0o700); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("there is a machine %q already (%s): %w", m.Name, m.Dir, fs.ErrExist)
	} else if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(m.Dir)
		}
	}()
	if err := m.roomFor(filepath.Join(imageDir, files[0])); err != nil {
		return err
	}
	for _, name := range files {
		to := name
		if name == isoFile {
			to = mediumFile
		}
		if err := copySparse(filepath.Join(m.Dir, to), filepath.Join(imageDir, name)); err != nil {
			return err
		}
	}
	if err := errors.Join(m.unpack(), m.makeVars(), m.makeDisk()); err != nil {
		return err
	}
	if len(claimKey) > 0 {
		if err := os.WriteFile(filepath.Join(m.Dir, ClaimKeyFile), claimKey, 0o600); err != nil {
			return err
		}
	}
	return m.save()
}

// makeDisk gives the disk its size; one that is to be installed to is empty.
func (m Machine) makeDisk() error {
	disk := filepath.Join(m.Dir, diskFile)
	if m.Medium {
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			return err
		}
	}
	return grow(disk, m.DiskSize)
}

// Eject takes the installation medium out of a machine that is off.
func (m *Machine) Eject() error {
	if m.running() != nil {
		return fmt.Errorf("machine %s is running", m.Name)
	}
	m.Medium = false
	if err := m.save(); err != nil {
		return err
	}
	return os.Remove(filepath.Join(m.Dir, mediumFile))
}

// unpack makes the kernel that QEMU boots; one that is not understood is booted as it is.
func (m Machine) unpack() error {
	packed, err := os.ReadFile(filepath.Join(m.Dir, "vmlinuz"))
	if err != nil {
		return err
	}
	kernel, err := unpackKernel(packed)
	if err != nil {
		kernel = packed
	}
	return os.WriteFile(filepath.Join(m.Dir, bootFile), kernel, 0o600)
}

func (m Machine) save() error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(m.Dir, configFile+".new")
	if err := os.WriteFile(tmp, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(m.Dir, configFile))
}

// Remove deletes the machine, which must not run. A machine that is not there is no error.
func (m Machine) Remove() error {
	if _, err := os.Stat(filepath.Join(m.Dir, configFile)); errors.Is(err, fs.ErrNotExist) {
		return nil // never delete a folder that is not ours
	}
	if m.running() != nil {
		return fmt.Errorf("machine %s is running", m.Name)
	}
	return os.RemoveAll(m.Dir)
}

// Console returns the path of the console's log.
func (m Machine) Console() string { return filepath.Join(m.Dir, ConsoleFile) }

// Port returns the port of 127.0.0.1 that leads to the guest's, 0 if none does.
func (m Machine) Port(guest int) int {
	for _, f := range m.Forwards {
		if f.Guest == guest {
			return f.Host
		}
	}
	return 0
}

func newUUID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
