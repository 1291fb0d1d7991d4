// Package dm makes encrypted block devices: it is a client of the kernel's device-mapper (linux/dm-ioctl.h) for the target crypt, and
// for nothing else.
//
// The volume's key goes to the kernel in the table, not over a keyring: Go moves goroutines between threads, and with them a thread's
// keyring. The kernel is asked to wipe its buffer, and ours are wiped here. Whoever has CAP_SYS_ADMIN can read the key back (Table);
// storaged does so to add keyslots, instead of keeping it.
package dm

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Crypt is the table of an encrypted device.
type Crypt struct {
	Device     string       // below, by number: "254:5"
	Offset     int64        // bytes on it before the data
	Length     int64        // bytes of data
	IVTweak    uint64       // added to the number of a sector
	SectorSize int          // bytes: 512 to 4096
	Key        secret.Bytes // of the volume
}

// Status is what the kernel says of a device.
type Status struct {
	Name, UUID   string
	Major, Minor uint32
	Open         int  // how often it is open: mounts, and devices above it
	Live         bool // it has a table that is in use
}

const (
	cipher = "aes-xts-plain64"
	sector = 512
	// options: discards reach the disk, for flash needs them; and no work queues, which cost more than they bring where encryption is quick.
	options = "allow_discards no_read_workqueue no_write_workqueue"
)

// params is the line after the target's name. The caller wipes it.
func (c Crypt) params() ([]byte, error) {
	switch {
	case c.Key.Len() != 32 && c.Key.Len() != 64:
		return nil, fmt.Errorf("crypt: a key of %d bytes", c.Key.Len())
	case c.SectorSize < 512 || c.SectorSize > 4096 || c.SectorSize&(c.SectorSize-1) != 0:
		return nil, fmt.Errorf("crypt: sectors of %d bytes", c.SectorSize)
	case c.Length <= 0 || c.Length%int64(c.SectorSize) != 0 || c.Offset < 0 || c.Offset%sector != 0:
		return nil, fmt.Errorf("crypt: %d bytes at %d are impossible with sectors of %d", c.Length, c.Offset, c.SectorSize)
	case c.Device == "" || strings.ContainsAny(c.Device, " \t\n"):
		return nil, fmt.Errorf("crypt: device %q", c.Device)
	}
	opt, count := options, 3
	if c.SectorSize != sector {
		opt, count = opt+" sector_size:"+strconv.Itoa(c.SectorSize), count+1
	}
	// One buffer, large enough from the start: growing would leave copies of the key behind.
	b := make([]byte, 0, len(cipher)+2*c.Key.Len()+len(c.Device)+len(opt)+80)
	b = append(append(b, cipher...), ' ')
	b = hex.AppendEncode(b, c.Key.Expose())
	b = fmt.Appendf(b, " %d %s %d %d %s", c.IVTweak, c.Device, c.Offset/sector, count, opt)
	return b, nil
}

// parseParams undoes params; options do not count, but for the size of sectors.
func parseParams(b []byte, length int64) (Crypt, error) {
	bad := errors.New("crypt: the kernel's table is not one of ours")
	head, rest, ok := cut(b)
	key, rest, ok2 := cut(rest)
	f := strings.Fields(string(rest)) // the key is not in it
	if !ok || !ok2 || string(head) != cipher || len(f) < 3 {
		return Crypt{}, bad
	}
	c := Crypt{Device: f[1], Length: length, SectorSize: sector}
	tweak, err := strconv.ParseUint(f[0], 10, 64)
	offset, err2 := strconv.ParseInt(f[2], 10, 64)
	if err := errors.Join(err, err2); err != nil || offset < 0 || offset > 1<<50 {
		return Crypt{}, bad
	}
	c.IVTweak, c.Offset = tweak, offset*sector
	for _, o := range f[3:] {
		if n, ok := strings.CutPrefix(o, "sector_size:"); ok {
			if c.SectorSize, err = strconv.Atoi(n); err != nil {
				return Crypt{}, bad
			}
		}
	}
	raw := make([]byte, hex.DecodedLen(len(key)))
	if _, err := hex.Decode(raw, key); err != nil {
		clear(raw)
		return Crypt{}, errors.New("crypt: the kernel does not show the key: it lies in a keyring")
	}
	c.Key = secret.From(raw)
	return c, nil
}

// cut splits at the first blank, without copying.
func cut(b []byte) (word, rest []byte, ok bool) {
	for i, c := range b {
		if c == ' ' {
			return b[:i], b[i+1:], true
		}
	}
	return nil, nil, false
}

var le = binary.LittleEndian

// The layout of struct dm_ioctl and struct dm_target_spec.
const (
	headerSize = 312
	specSize   = 40

	atDataSize  = 12
	atDataStart = 16
	atTargets   = 20
	atOpen      = 24
	atFlags     = 28
	atDev       = 40
	atName      = 48
	atUUID      = 176
	maxName     = 127
	maxUUID     = 128

	flagSuspend    = 1 << 1 // DM_SUSPEND_FLAG; for DM_DEV_SUSPEND, without it: resume
	flagTable      = 1 << 4 // DM_STATUS_TABLE_FLAG
	flagActive     = 1 << 5 // DM_ACTIVE_PRESENT_FLAG
	flagBufferFull = 1 << 8 // DM_BUFFER_FULL_FLAG
	flagSecure     = 1 << 15
)

// The commands that are used.
const (
	cmdCreate  = 3
	cmdRemove  = 4
	cmdSuspend = 6
	cmdStatus  = 7
	cmdLoad    = 9
	cmdTable   = 12
)

// message is a dm_ioctl with room bytes behind it.
func message(name, uuid string, flags uint32, room int) ([]byte, error) {
	if name == "" || len(name) > maxName || len(uuid) > maxUUID || strings.ContainsAny(name+uuid, "\x00/") {
		return nil, fmt.Errorf("device-mapper: impossible name %q or UUID %q", name, uuid)
	}
	b := make([]byte, headerSize+room)
	le.PutUint32(b, 4) // the interface's version
	le.PutUint32(b[atDataSize:], uint32(len(b)))
	le.PutUint32(b[atDataStart:], headerSize)
	le.PutUint32(b[atFlags:], flags|flagSecure)
	copy(b[atName:], name)
	copy(b[atUUID:], uuid)
	return b, nil
}

// loadMessage is the one that carries a table.
func loadMessage(name string, c Crypt) ([]byte, error) {
	params, err := c.params()
	if err != nil {
		return nil, err
	}
	defer clear(params)
	b, err := message(name, "", 0, (specSize+len(params)+8)&^7) // with a NUL, and a multiple of eight
	if err != nil {
		return nil, err
	}
	le.PutUint32(b[atTargets:], 1)
	spec := b[headerSize:]
	le.PutUint64(spec[8:], uint64(c.Length/sector))
	copy(spec[24:], "crypt")
	copy(spec[specSize:], params)
	return b, nil
}

// parseStatus reads the kernel's answer to any command.
func parseStatus(b []byte) Status {
	dev := le.Uint64(b[atDev:])
	return Status{
		Name: text(b[atName : atName+maxName+1]), UUID: text(b[atUUID : atUUID+maxUUID+1]), Open: int(int32(le.Uint32(b[atOpen:]))),
		Live: le.Uint32(b[atFlags:])&flagActive != 0, Major: uint32(dev>>8) & 0xfff, Minor: uint32(dev&0xff) | uint32(dev>>12)&^0xff,
	}
}

// parseTable reads the kernel's answer to cmdTable.
func parseTable(b []byte) (Crypt, error) {
	start := le.Uint32(b[atDataStart:])
	if le.Uint32(b[atFlags:])&flagBufferFull != 0 || le.Uint32(b[atTargets:]) != 1 || start > uint32(len(b)) || len(b)-int(start) < specSize {
		return Crypt{}, errors.New("device-mapper: the table is not one of ours")
	}
	spec := b[start:]
	if le.Uint64(spec) != 0 || text(spec[24:specSize]) != "crypt" {
		return Crypt{}, errors.New("device-mapper: the table is not one of ours")
	}
	params := spec[specSize:]
	for i, c := range params {
		if c == 0 {
			params = params[:i]
			break
		}
	}
	return parseParams(params, int64(le.Uint64(spec[8:]))*sector)
}

func text(b []byte) string {
	s, _, _ := strings.Cut(string(b), "\x00")
	return s
}
