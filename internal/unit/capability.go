package unit

// capabilities are the bit numbers of linux/capability.h.
var capabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
	"SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
	"SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
	"MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
	"CHECKPOINT_RESTORE",
}

// AllCapabilities has the bit of every capability set.
const AllCapabilities uint64 = 1<<41 - 1

// Capability returns the bit of a capability's name, without "CAP_"; 0 if there is none of that name.
func Capability(name string) uint64 {
	for i, n := range capabilities {
		if n == name {
			return 1 << i
		}
	}
	return 0
}

// CapabilityNames returns the names of a mask's capabilities, in the order of their bits.
func CapabilityNames(mask uint64) (names []string) {
	for i, n := range capabilities {
		if mask&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return names
}
