package qemu

import (
	"crypto/sha256"
	"fmt"
	"strings"
)

const (
	accelKVM = "kvm"
	accelTCG = "tcg"

	program = "qemu-system-x86_64"
)

// board is a PC of today without the parts that a node has no use for and that the kernel would look for.
const board = "q35,sata=off,smbus=off,i8042=off,hpet=off"

// EmulatedCommandLine is added to the command line where every instruction is emulated: it turns off what guards against real
// hardware's flaws and against nothing here, and what costs seconds at boot; and it has timers tick. A timer that is set for
// a moment of its own wakes QEMU twice, 10,000 times a second in all on a node that starts Kubernetes: with 250 ticks a
// second it is Ready after 102 s instead of 148. A kernel with one processor takes the lock prefixes out of its code, one by one: 0.6 s
// (noreplace-smp). It belongs to no image but a test's.
const EmulatedCommandLine = "mitigations=off no5lvl nokaslr apparmor=0 cryptomgr.notests highres=off nohz=off noreplace-smp"

// EmulatedCPU is QEMU's -cpu under software emulation: all that it can do, but for what QEMU 7.2 does wrong (cx16) and what it does slowest. See docs/boot.md, "Traps".
const EmulatedCPU = "max,-cx16,-erms,-avx2,-avx,-sse4.2"

// args returns QEMU's arguments. It is pure: cmdline is the image's, accel is decided, tsc is the rate of the host's time stamp counter (tscRate), ports are known,
// claimed says whether there is a claim key; a TPM's connection is the descriptor tpmFD. Names of files are relative to the machine's folder, in which QEMU is started, but for
// the pid file, whose full name tells this machine's QEMU from all others.
func (m Machine) args(cmdline, accel string, tsc int, claimed bool) []string {
	cmdline, machine := strings.TrimSpace(cmdline), board
	cpu, accelerator := "host", "kvm"
	if accel == accelTCG {
		cpu, accelerator = EmulatedCPU, "tcg,thread=multi"
		cmdline += " " + EmulatedCommandLine + clockArgs(tsc*max(1, m.Slow))
	}
	if m.Append != "" {
		cmdline += " " + m.Append
	}
	boot, disk := []string{"-kernel", bootFile, "-initrd", "initramfs.cpio", "-append", cmdline}, "virtio-blk-pci,drive=disk"
	if m.Firmware == UEFI {
		boot = m.firmwareArgs()
	}
	if m.Firmware == UEFI && !m.Medium {
		disk += ",bootindex=0" // or the firmware would ask the network, too
	}
	if m.SecureBoot {
		machine += ",smm=on"
	}
	a := []string{
		"-name", "bulkhead-" + m.Name, "-uuid", m.UUID, "-no-user-config", "-nodefaults", "-display", "none", "-daemonize",
		"-pidfile", m.pidPath(),
		"-machine", machine, "-accel", accelerator, "-cpu", cpu, "-smp", fmt.Sprint(m.CPUs), "-m", fmt.Sprint(m.Memory),
	}
	a = append(a, boot...)
	if m.Medium { // before the disk, and without an order: a firmware, or a kernel, that takes what it finds first takes the medium
		a = append(a, "-drive", "file="+mediumFile+",format=raw,if=none,id=medium,readonly=on", "-device", "virtio-blk-pci,drive=medium,serial=medium")
	}
	a = append(a, m.diskArgs()...)
	a = append(a,
		"-device", disk,
		"-netdev", m.netdev(), "-device", "virtio-net-pci,netdev=net,romfile=,mac="+mac(m.Name))
	if m.LAN != "" { // right behind the first, so that the guest counts it as its second; the switch dials, so that it may come and go
		a = append(a, "-netdev", fmt.Sprintf("stream,id=lan,server=on,addr.type=unix,addr.path=/proc/self/fd/%d/%s", lanFD, LANSocket), "-device", "virtio-net-pci,netdev=lan,romfile=,mac="+mac("lan/"+m.Name))
	}
	a = append(a,
		"-device", "virtio-rng-pci",
		"-device", "i6300esb", "-action", "watchdog=reset",
		"-chardev", "file,id=console,path="+ConsoleFile, "-serial", "chardev:console",
		"-qmp", "unix:"+qmpSocket+",server=on,wait=off")
	if m.TPM {
		a = append(a, "-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", tpmFD), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0")
	}
	if claimed {
		a = append(a, "-fw_cfg", "name=opt/dev.bulkhead/claim-key,file="+ClaimKeyFile)
	}
	return append(a, m.Extra...)
}

// diskArgs make the disk, by the name "disk".
func (m Machine) diskArgs() []string {
	if m.Record != "" { // the guest's flushes must reach the driver that records; nothing else needs them
		const plain = "discard=unmap,cache.no-flush=on"
		return []string{
			"-blockdev", "driver=file,node-name=disk-file,filename=" + diskFile + "," + plain,
			"-blockdev", "driver=raw,node-name=disk-raw,file=disk-file," + plain,
			"-blockdev", "driver=file,node-name=disk-log,filename=" + m.Record + ",cache.no-flush=on",
			"-blockdev", "driver=blklogwrites,node-name=disk,file=disk-raw,log=disk-log,discard=unmap",
		}
	}
	cache := "unsafe"
	if m.Durable {
		cache = "writeback"
	}
	return []string{"-drive", "file=" + diskFile + ",format=raw,if=none,id=disk,discard=unmap,cache=" + cache}
}

func (m Machine) netdev() string {
	var b strings.Builder
	b.WriteString("user,id=net")
	if m.Isolated {
		b.WriteString(",restrict=on")
	}
	for _, f := range m.Forwards {
		fmt.Fprintf(&b, ",hostfwd=tcp:127.0.0.1:%d-:%d", f.Host, f.Guest)
	}
	return b.String()
}

// mac follows from the name, so that a machine keeps its address: in QEMU's own range.
func mac(name string) string {
	s := sha256.Sum256([]byte(name))
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", s[0], s[1], s[2])
}
