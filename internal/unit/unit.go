// Package unit says what a unit is: one process that PID 1 starts, and all that it may do.
//
// A unit is written as unit.json beside the daemon's code (more than one: <name>.unit.json). "make gen" checks
// every such file and turns them into Go literals for PID 1, which therefore parses nothing at run time. This file must import nothing that
// PID 1 should not hold; reading JSON is in package unitfile.
package unit

import "time"

// Unit is one supervised process. The zero value of a field means what its comment says.
type Unit struct {
	// Name is the unit's name, argv[0] of the process, and the name of its socket and control group.
	Name string
	// Exec is the program and its arguments after argv[0]. Exec[0] is an absolute path.
	Exec []string
	// Env is added to PATH, BULKHEAD_UNIT and BULKHEAD_FDS.
	Env []string

	// UID and Groups are numeric ids. The primary group is the number of UID.
	UID    uint32
	Groups []uint32
	// Capabilities is a bit mask as in capabilities(7); the process has exactly these in its permitted,
	// effective, inheritable, ambient and bounding sets (root units: permitted, effective, bounding).
	Capabilities uint64
	// NewPrivileges is true where execve may raise privileges (containerd); the default is no_new_privs.
	NewPrivileges bool

	// Network is "none" (an empty network namespace; inherited listeners still work) or "host".
	Network string
	// MountNamespace is "" (one of its own, which sees later mounts of the host but makes none there),
	// or "shared" (one of its own, whose mounts appear on the host: storaged).
	MountNamespace string
	// Holds is true for the unit whose process is the first in namespaces of its own for mounts, processes and control groups, in which
	// other units live. When it ends, they and all that they started end with it.
	Holds bool
	// Show lists the folders of the host that are mounted in a holder's namespaces, besides devices, the kernel's file systems and the
	// root; all else is not there. What is below RunDir is read-only.
	Show []string
	// Inside is the name of the unit in whose namespaces it lives; "" is none.
	Inside string
	// Hide lists folders over which an empty read-only tmpfs is mounted.
	Hide []string
	// Proc is "" (a /proc of its own, in which other users' processes do not exist) or "host" (that of the mount namespace).
	Proc string

	// Syscalls are the names of the system calls it may make, sorted, each once; nil means all. Any other ends the process.
	Syscalls []string
	// Sockets are the socket families it may open ("unix", "inet", "inet6", "packet", "netlink:route"): what socket(2) is allowed for.
	Sockets []string
	// Ioctls and Prctls are the requests that ioctl(2) and the options that prctl(2) are allowed for.
	Ioctls, Prctls []uint32
	// Filter is the seccomp program that holds it to these four: each instruction is a struct sock_filter as a number. Only package main of
	// init has it, made by "go generate"; nil means none.
	Filter []uint64

	// FilesAll is true if Landlock restricts no files; Read, Write and Execute are then empty.
	FilesAll bool
	// Read lists files and folders, with all that is below, that it may read; Write those that it may also write, make, rename and remove in;
	// Execute the programs that it may start besides its own.
	Read, Write, Execute []string
	// Volume is the folder on which a volume is mounted while the process runs already; "" is none. Landlock ties a rule to a folder that is there, so until then it may do
	// with all files what Write allows, as far as its user may; then the process itself puts Read, Write and Execute on, for good (package daemon).
	Volume string
	// Bind and Connect are the TCP ports that it may listen on by itself (0: one that the kernel chooses) and connect to.
	Bind, Connect []uint16
	// BindAll and ConnectAll mean every port.
	BindAll, ConnectAll bool
	// Landlock is a struct landlock_ruleset_attr (files, ports, scopes), and Rules what of it is allowed: what the fields above come to, for the kernel.
	// Only package main of init has them; zero means no restriction.
	Landlock [3]uint64
	Rules    []Rule

	// Listen lists the listening sockets that PID 1 binds at boot and keeps: "unix" is
	// /run/bulkhead/sock/<name>.sock (SOCK_STREAM, mode 0666), "tcp:PORT" is all addresses of the host's network,
	// "loopback:PORT" 127.0.0.1 only.
	Listen []string
	// Console is true if the process gets /dev/console, for writing, as descriptor "console".
	Console bool

	// Limits of its control group (cgroup v2); 0 means "max". MemoryMax is in bytes.
	MemoryMax uint64
	PidsMax   uint64
	CPUWeight uint64
	// Delegate leaves the control group's subtree to the process (containerd, kubelet).
	Delegate bool
	// NoFile is RLIMIT_NOFILE, soft and hard; 0 means 1024.
	NoFile uint64
	// OOMScoreAdj is as in proc_pid_oom_score_adj(5).
	OOMScoreAdj int

	// Restart is "always", "on-failure" or "never". Exit code 125 means "do not restart me" for all of them.
	Restart string
	// Autostart is true if PID 1 starts it at boot.
	Autostart bool
	// Late is true if it is not started at boot before all modules are loaded: the heavy ones, and those that start what needs modules.
	Late bool
	// NotifyReady is true if the process writes a newline to descriptor 3; else it counts as ready once it runs.
	NotifyReady bool
	// KillProcess is true if only the main process is killed on stop, not its whole control group (containerd).
	KillProcess bool
	// StartTimeout and StopTimeout are how long it may take to be ready, and to exit after SIGTERM.
	// Zero StartTimeout: no limit. Zero StopTimeout: 10 seconds.
	StartTimeout, StopTimeout time.Duration

	// Owners lists the users that may start, stop and restart it, besides machined.
	Owners []uint32
	// Runtime is the mode of /run/bulkhead/<name>, made at boot and owned by the unit; 0 means no such folder.
	Runtime uint32
	// Umask is the process's; 0 means 0077. containerd and the kubelet need 0022: they make folders that pods of other users enter.
	Umask uint32
}

// Group is the unit's control group, below the one of all units.
func (u *Unit) Group() string {
	if u.Inside != "" {
		return u.Inside + "/" + u.Name
	}
	return u.Name
}

// Rule allows Access, Landlock's bits, to a path with what is below, or, if there is none, to a TCP port.
type Rule struct {
	Access uint64
	Path   string
	Port   uint16
}

// Variables in the environment of a unit that has a Volume: its folder, and the unit's own rules for files as package landlock writes them.
const (
	VolumeEnv = "BULKHEAD_VOLUME"
	RulesEnv  = "BULKHEAD_RULES"
)

// Paths that PID 1 and the daemons agree on.
const (
	// RunDir holds one folder for each unit that asks for one.
	RunDir = "/run/bulkhead"
	// SocketDir holds the listening sockets of all daemons, and PID 1's control socket.
	SocketDir = "/run/bulkhead/sock"
	// InitSocket is PID 1's control socket (SOCK_SEQPACKET).
	InitSocket = SocketDir + "/init.sock"
	// StateDir is where STATE is mounted; each daemon that keeps something has a folder of its name there.
	StateDir = "/state"
	// GoodFile is there once updated knows that the running version is good; JudgedFile is written anew each time when it has looked at one on
	// trial. PID 1 leaves a version that is not judged any more and was not found good.
	GoodFile   = RunDir + "/updated/good"
	JudgedFile = RunDir + "/updated/judged"
	// LockedFile is there while STATE is encrypted and not open: trustd then knows that the owner is not known yet. Its text is the reason.
	LockedFile = RunDir + "/storaged/locked"
	// HostnameFile has the machine's name, as networkd found it out: /etc/hostname is a link to it, and PID 1 makes it the kernel's.
	HostnameFile = RunDir + "/networkd/hostname"
	// FirstListener is the number of the first descriptor named in BULKHEAD_FDS; 3 is the ready pipe.
	FirstListener = 4
	// DoNotRestart is the exit code that ends a unit for good.
	DoNotRestart = 125
	// NotConfined is the exit code of a unit's process that could not be confined, or its program not started: it may work the next time.
	NotConfined = 126
)
