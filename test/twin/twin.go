// Package twin is the evil twin of a daemon: what somebody would try who has taken it over. A build of the node's programs with the tag
// "twin" has it; such a daemon does its work as ever, and, when a further generation of the configuration reaches it, tries everything that
// Probes lists, under the unit's own confinement, and writes what became of it into its log.
//
// Every twin tries the same. What the answers must be follows from the unit: package derive, which is the host's side. A probe changes
// nothing even where it is let through; those that do (memory, threads) end the daemon itself and nothing else. It is never in an image
// that somebody uses, and never run outside of a virtual machine but for what package derive's own test runs in namespaces.
package twin

import (
	"slices"

	"golang.org/x/sys/unix"
)

// What became of a probe. Errors of the kernel have their names: "EACCES".
const (
	OK       = "ok"
	Filter   = "filter"    // the system call ends the process; here it fails with Killed instead
	Untried  = "not tried" // it would succeed, and do harm
	NoGate   = "no gate"   // the machine has no way of i386 into its kernel; a node has
	Door     = "door"      // the daemon ends connections of this user
	List     = "list"      // the daemon's list of callers does not have this user for the method
	Unserved = "unserved"  // no such method behind this socket
	Silent   = "silent"    // no answer within a while
)

// Killed is the error that the filter of a twin's image answers with where that of a real one ends the process. No system call has it.
const Killed = unix.Errno(4090)

// Groups of probes, in the order of a page. Those of one stage are tried together.
const (
	Calls       = "system calls"
	Arguments   = "arguments of system calls"
	Files       = "files"
	Devices     = "devices"
	Sockets     = "sockets"
	RPCs        = "calls of daemons"
	Verbs       = "orders to PID 1"
	Processes   = "other processes"
	Identity    = "identity and limits"
	Mounts      = "mounts"
	Kernel      = "modules, programs in the kernel, the machine"
	Namespaces  = "namespaces"
	Keys        = "keyrings"
	Network     = "network"
	Settings    = "settings of the kernel"
	Descriptors = "descriptors"
	Disk        = "disk"
	Threads     = "threads"
	Memory      = "memory"
)

// Groups returns all groups in their order.
func Groups() []string {
	return []string{Calls, Arguments, Files, Devices, Sockets, RPCs, Verbs, Processes, Identity, Mounts, Kernel, Namespaces, Keys, Network, Settings, Descriptors, Disk, Threads, Memory}
}

// A Probe is one thing that is tried. Its fields besides the name are what the expected answer is derived from.
type Probe struct {
	Group, Name string
	// Calls are the system calls that it needs: without one of them the filter ends the process.
	Calls []string
	// Caps are capabilities of which one is needed; nil: none. See Nobody.
	Caps []string
	// Nobody is true if no daemon may, whatever its capabilities.
	Nobody bool

	Path   string // of a file
	Write  bool   // it is written, or something is made in it
	Owner  string // the user whose file or folder it is; "" is root
	Mode   uint32 // the file's or folder's
	Maybe  bool   // it need not be there
	Kind   Kind
	Socket string // the daemon whose socket it is, or "init"
	Method string // of an RPC: "/service/Method"
	Verb   string // to PID 1
	Unit   string // that it is about
	Family string // of a socket, as in a unit; "" if no unit can have it
	Port   uint16
	Number uint32 // of an ioctl or prctl
	Node   bool   // the answer depends on the node's kernel parameters, or it is harmless only there

	run func(*env) string
}

// Kind tells files of which the kernel has rules of its own.
type Kind uint8

// Kinds of files.
const (
	Plain    Kind = iota
	Param         // a kernel parameter: for root, whatever the capabilities are
	NetParam      // one of the network: for NET_ADMIN too
	Own           // in /proc, of the process itself
	Other         // in /proc, of another process
	Pseudo        // of the kernel's own file systems: Landlock and DAC_OVERRIDE count as for others
)

// ID names a probe among all.
func (p *Probe) ID() string { return p.Group + ": " + p.Name }

// refusals are the answers of somebody who does not let it happen.
var refusals = []string{Filter, "EACCES", "EPERM", "EROFS", Door, List}

// Refused reports whether an answer says that the attempt was not let through.
func Refused(answer string) bool { return slices.Contains(refusals, answer) }

// Stage is when a unit's twin tries a group: 1 first; what ends the process comes last, each by itself, and machined's end after all others': it keeps
// what they write, and what it has read and not yet kept when it ends is lost.
func Stage(group, unit string) int {
	stage := 1
	switch group {
	case Descriptors, Disk:
		stage = 2
	case Threads:
		stage = 3
	case Memory:
		stage = 4
	}
	if stage > 2 && unit == "machined" {
		stage += 2
	}
	return stage
}

// Anywhere returns the probes that need no node: they may be tried in namespaces of any machine. Try runs one in this process.
func Anywhere() (out []Probe) {
	for _, p := range Probes() {
		if slices.Contains([]string{Calls, Arguments, Identity, Mounts, Kernel, Namespaces, Keys}, p.Group) || p.Group == Network && p.Verb == "" {
			if !p.Node {
				out = append(out, p)
			}
		}
	}
	return out
}

// Stages is the last one's number.
const Stages = 6

// env is what probes share in one process.
type env struct {
	name  string // the unit's
	limit uint64 // of descriptors
	pids  map[string]int
	conns map[string]*way
	count func(n int) // tells how far a probe is that ends the process
}

// Probes returns everything that is tried, in order. It is the same for every daemon.
func Probes() (all []Probe) {
	for _, f := range []func() []Probe{calls, arguments, files, devices, sockets, rpcs, verbs, processes, identity, mounts, kernel, namespaces, keys, network, settings, limits} {
		all = append(all, f()...)
	}
	return all
}

// says is the answer that an error is.
func says(err error) string {
	if err == nil {
		return OK
	}
	if e, ok := errnoOf(err); ok {
		return name(e)
	}
	return err.Error()
}

func name(e unix.Errno) string {
	switch {
	case e == 0:
		return OK
	case e == Killed:
		return Filter
	}
	if n := unix.ErrnoName(e); n != "" {
		return n
	}
	return "errno " + itoa(int(e))
}
