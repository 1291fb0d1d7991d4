package storaged

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// blkpg is the ioctl BLKPG (linux/blkpg.h), which changes one partition and leaves the others alone. Start and length are in bytes.
func blkpg(disk *os.File, op int32, number int, start, length int64) error {
	part := unix.BlkpgPartition{Start: start, Length: length, Pno: int32(number)}
	arg := unix.BlkpgIoctlArg{Op: op, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(&part)
	if errno != 0 {
		return fmt.Errorf("BLKPG %d: partition %d: %w", op, number, errno)
	}
	return nil
}

// resizeExt4 is the ioctl EXT4_IOC_RESIZE_FS (linux/fs/ext4/ext4.h) on a mounted file system; resize2fs does nothing else. It needs SYS_RESOURCE.
func resizeExt4(fs int, blocks uint64) error {
	const resizeFS = 0x40086610 // _IOW('f', 16, __u64)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fs), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return fmt.Errorf("EXT4_IOC_RESIZE_FS to %d blocks: %w", blocks, errno)
	}
	return nil
}
