package boot

import (
	"encoding/binary"
	"os"
	"unsafe" // the only file of PID 1 that does

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

// Of linux/dm-ioctl.h.
const (
	dmHeader    = 312 // struct dm_ioctl
	dmSpec      = 40  // struct dm_target_spec
	dmReadOnly  = 1
	dmDevCreate = 3
	dmSuspend   = 6 // without its flag: resume
	dmTableLoad = 9
	dmRequest   = 0xc138fd00 // _IOWR(0xfd, nr, struct dm_ioctl)
)

// createDevice makes a read-only device of one target and returns its minor number. id is what others know its kind by. What it leaves
// after an error is not removed: the machine does not go on.
func createDevice(name, id string, sectors uint64, target, params string) (minor int, err error) {
	fd, err := unix.Open("/dev/mapper/control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("open /dev/mapper/control", err)
	}
	defer unix.Close(fd)
	var f console.First
	create := dmMessage(name, 0, "", "")
	copy(create[176:176+128], id)
	dev, err := dmIoctl(fd, dmDevCreate, create)
	f.Try("create the device", err)
	_, err = dmIoctl(fd, dmTableLoad, dmMessage(name, sectors, target, params))
	f.Try("load the table "+params, err)
	_, err = dmIoctl(fd, dmSuspend, dmMessage(name, 0, "", ""))
	f.Try("start the device", err)
	return int(dev&0xff | dev>>12&^0xff), f.Err
}

// dmMessage is a dm_ioctl and, unless target is empty, one target behind it.
func dmMessage(name string, sectors uint64, target, params string) []byte {
	le := binary.LittleEndian
	b := make([]byte, dmHeader)
	if target != "" {
		b = make([]byte, dmHeader+(dmSpec+len(params)+8)&^7) // with a NUL, and a multiple of eight
		le.PutUint32(b[20:], 1)                              // targets
		le.PutUint64(b[dmHeader+8:], sectors)
		copy(b[dmHeader+24:dmHeader+39], target)
		copy(b[dmHeader+dmSpec:], params)
	}
	le.PutUint32(b[0:], 4) // version of the interface
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], dmHeader)
	le.PutUint32(b[28:], dmReadOnly)
	copy(b[48:48+127], name)
	return b
}

func dmIoctl(fd int, nr uintptr, message []byte) (dev uint64, err error) {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), dmRequest|nr, uintptr(unsafe.Pointer(&message[0]))); errno != 0 {
		err = errno
	}
	return binary.LittleEndian.Uint64(message[40:]), err
}
