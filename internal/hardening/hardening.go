// Package hardening is the one list of what the kernel is told for its own protection: words of its command line, which the image
// builder writes, and parameters, which PID 1 sets and reads back. machined compares the list with what is. The lists follow the
// Kernel Self-Protection Project where a Kubernetes node can live with it; docs/hardening.md says where not, and what each costs.
//
// PID 1 links this package: it is tables and strings only.
package hardening

import "strings"

// A Word is one word of the kernel command line.
type Word struct {
	Name  string // as the kernel wants it: "module.sig_enforce"
	Value string // what stands behind =; "" for a word that has no value
	Why   string // one line, for a person
}

// String is the word as it stands on the command line.
func (w Word) String() string {
	if w.Value == "" {
		return w.Name
	}
	return w.Name + "=" + w.Value
}

// Words are in the order in which they stand on the command line.
var Words = []Word{
	{"lockdown", "integrity", "not even root changes the running kernel: no /dev/mem, no unsigned kexec, no MSRs"},
	{"module.sig_enforce", "1", "only modules that Debian signed are loaded"},
	{"init_on_alloc", "1", "memory is zeroed before it is handed out: no old secrets in it"},
	{"slab_nomerge", "", "kinds of objects keep to memory of their own: an overflow reaches only its like"},
	{"page_alloc.shuffle", "1", "free pages are handed out in a random order"},
	{"randomize_kstack_offset", "on", "the kernel's stack begins elsewhere at each system call"},
	{"vsyscall", "none", "no code at an address that is the same in every process"},
	{"debugfs", "off", "the kernel's debugging files do not exist"},
	{"oops", "panic", "a kernel that has erred stops, and restarts; from the first instruction on"},
	{"proc_mem.force_override", "never", "/proc/PID/mem does not write where the program itself may not"},
}

// CommandLine is all Words as they stand on the command line.
func CommandLine() string {
	var all []string
	for _, w := range Words {
		all = append(all, w.String())
	}
	return strings.Join(all, " ")
}

// A Param is one kernel parameter, a file below /proc/sys.
type Param struct {
	Name  string // with dots: "kernel.kptr_restrict"; no part of it has a dot in its own name
	Value string // as the kernel shows it, but for white space
	Late  bool   // it is set only when the last module is loaded
	Why   string // one line, for a person
}

// Path is the parameter's file.
func (p Param) Path() string { return "/proc/sys/" + strings.ReplaceAll(p.Name, ".", "/") }

// Is says whether text, as read from the parameter's file, is the value that is wanted.
func (p Param) Is(text string) bool { return Plain(text) == p.Value }

// Plain is a parameter's text with single blanks between its parts, and none around them.
func Plain(text string) string { return strings.Join(strings.Fields(text), " ") }

// Params are in the order in which PID 1 sets them.
var Params = []Param{
	{Name: "dev.tty.ldisc_autoload", Value: "0", Why: "a terminal does not bring old protocol drivers in"},
	{Name: "dev.tty.legacy_tiocsti", Value: "0", Why: "nobody types into somebody else's terminal"},
	{Name: "fs.protected_fifos", Value: "2", Why: "root is not tricked into a FIFO that another made in a shared folder"},
	{Name: "fs.protected_hardlinks", Value: "1", Why: "no hard links to files that one may not write"},
	{Name: "fs.protected_regular", Value: "2", Why: "root is not tricked into a file that another made in a shared folder"},
	{Name: "fs.protected_symlinks", Value: "1", Why: "links in shared folders are followed for their owner only"},
	{Name: "fs.suid_dumpable", Value: "0", Why: "no memory image of a process that changed its identity"},
	{Name: "kernel.core_pattern", Value: "", Why: "memory images are not written: they hold keys"},
	{Name: "kernel.dmesg_restrict", Value: "1", Why: "the kernel's log, which names addresses, is for those with SYSLOG"},
	{Name: "kernel.io_uring_disabled", Value: "1", Why: "io_uring, the source of many flaws, is for SYS_ADMIN only"},
	{Name: "kernel.kexec_load_disabled", Value: "1", Why: "no other kernel takes over from this one"},
	{Name: "kernel.kptr_restrict", Value: "2", Why: "nobody reads the kernel's addresses"},
	{Name: "kernel.panic_on_oops", Value: "1", Why: "an exploit that missed gets no second try: the machine restarts"},
	{Name: "kernel.perf_event_paranoid", Value: "3", Why: "measuring others' timing is for PERFMON only"},
	{Name: "kernel.randomize_va_space", Value: "2", Why: "stack, heap and libraries lie at random addresses"},
	{Name: "kernel.sysrq", Value: "0", Why: "no key on a console or serial line commands the kernel"},
	{Name: "kernel.unprivileged_bpf_disabled", Value: "1", Why: "programs for the kernel are loaded with the capability BPF only"},
	{Name: "kernel.unprivileged_userns_clone", Value: "0", Why: "user namespaces are made by containerd (hostUsers: false), not by pods"},
	{Name: "kernel.usermodehelper.bset", Value: "0 0", Why: "a program that the kernel is made to start has no capabilities"},
	{Name: "kernel.usermodehelper.inheritable", Value: "0 0", Why: "a program that the kernel is made to start has no capabilities"},
	{Name: "kernel.yama.ptrace_scope", Value: "2", Why: "looking into another process is for SYS_PTRACE only"},
	{Name: "net.core.bpf_jit_harden", Value: "2", Why: "constants in compiled programs are blinded"},
	{Name: "net.ipv4.conf.all.accept_redirects", Value: "0", Why: "no neighbour bends routes"},
	{Name: "net.ipv4.conf.all.accept_source_route", Value: "0", Why: "no packet chooses its own way"},
	{Name: "net.ipv4.conf.all.secure_redirects", Value: "0", Why: "no gateway bends routes either"},
	{Name: "net.ipv4.conf.all.send_redirects", Value: "0", Why: "the node, which forwards for pods, bends nobody's routes"},
	{Name: "net.ipv4.conf.default.accept_redirects", Value: "0", Why: "no neighbour bends routes"},
	{Name: "net.ipv4.conf.default.accept_source_route", Value: "0", Why: "no packet chooses its own way"},
	{Name: "net.ipv4.conf.default.rp_filter", Value: "2", Why: "a sender to whom no way leads is forged; loose, for pods' ways differ"},
	{Name: "net.ipv4.conf.default.secure_redirects", Value: "0", Why: "no gateway bends routes either"},
	{Name: "net.ipv4.conf.default.send_redirects", Value: "0", Why: "the node, which forwards for pods, bends nobody's routes"},
	{Name: "net.ipv4.icmp_echo_ignore_broadcasts", Value: "1", Why: "no amplifier for floods"},
	{Name: "net.ipv4.tcp_rfc1337", Value: "1", Why: "old packets do not end a connection in TIME-WAIT"},
	{Name: "net.ipv4.tcp_syncookies", Value: "1", Why: "a flood of half-open connections shuts nobody out"},
	{Name: "net.ipv6.conf.all.accept_redirects", Value: "0", Why: "no neighbour bends routes"},
	{Name: "net.ipv6.conf.all.accept_source_route", Value: "0", Why: "no packet chooses its own way"},
	{Name: "net.ipv6.conf.default.accept_redirects", Value: "0", Why: "no neighbour bends routes"},
	{Name: "net.ipv6.conf.default.accept_source_route", Value: "0", Why: "no packet chooses its own way"},
	{Name: "vm.mmap_min_addr", Value: "65536", Why: "a null pointer of the kernel leads to nothing that a process put there"},
	{Name: "vm.mmap_rnd_bits", Value: "32", Why: "as many random bits in addresses as there can be"},
	{Name: "vm.mmap_rnd_compat_bits", Value: "16", Why: "the same for 32-bit programs"},
	{Name: "vm.unprivileged_userfaultfd", Value: "0", Why: "nobody stops the kernel in the middle of a copy"},
	{Name: "kernel.modules_disabled", Value: "1", Late: true, Why: "the kernel is closed: no code enters it until the next boot"},
}

// ParamsFile is where PID 1 writes, each minute, what it reads back of Params: lines of name, tab and value. A parameter that the
// kernel does not have is not in it. machined could not read them all itself: its network is another one, and some are root's.
const ParamsFile = "/run/bulkhead/boot/sysctls"
