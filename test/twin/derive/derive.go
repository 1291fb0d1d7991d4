// Package derive says what the answers of an evil twin (test/twin) must be. All of it follows from the unit, the daemons' lists of callers and
// the methods' table: nothing here names a daemon and what it may do. What it knows besides is the kernel's own rules.
package derive

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	"github.com/bulkhead-os/bulkhead/apid"
	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
	"github.com/bulkhead-os/bulkhead/networkd"
	"github.com/bulkhead-os/bulkhead/services/etcdd"
	"github.com/bulkhead-os/bulkhead/services/kubeletd"
	"github.com/bulkhead-os/bulkhead/services/machined"
	"github.com/bulkhead-os/bulkhead/services/updated"
	"github.com/bulkhead-os/bulkhead/storaged"
	"github.com/bulkhead-os/bulkhead/test/twin"
	"github.com/bulkhead-os/bulkhead/trustd"
	"golang.org/x/sys/unix"
)

// A World is all units, and who may call what.
type World struct {
	Units map[string]unit.Unit
	Lists map[string]peer.List // complete ones, by daemon
}

// New reads the units of a source tree.
func New(tree fs.FS) (*World, error) {
	units, err := unitfile.Load(tree)
	if err != nil {
		return nil, err
	}
	w := &World{Units: map[string]unit.Unit{}, Lists: map[string]peer.List{}}
	for _, u := range units {
		w.Units[u.Name] = u
	}
	for d, own := range extra {
		w.Lists[d] = complete(d, own())
	}
	w.Lists["apid"] = apid.Callers()
	return w, nil
}

// extra are the daemons' own lists. apid's is complete.
var extra = map[string]func() peer.List{
	"etcdd": etcdd.Callers, "gateway": func() peer.List { return nil }, "kubeletd": kubeletd.Callers, "machined": machined.Callers, "networkd": networkd.Callers,
	"storaged": storaged.Callers, "trustd": trustd.Callers, "updated": updated.Callers,
}

// complete is the list that a daemon's socket has: machined may control, apid and machined may ask for its health, apid may call what is served for the
// world outside, those on the daemon's own list what stands there. A method's entry goes before its service's.
func complete(daemon string, own peer.List) peer.List {
	out := peer.List{"grpc.health.v1.Health": {uid.Apid, uid.Machined}}
	if slices.Contains(twin.Internal["control.v1.Control"], daemon) {
		out["control.v1.Control"] = []uid.ID{uid.Machined}
	}
	for k, v := range own {
		out[k] = append(slices.Clone(out[k]), v...)
	}
	for _, m := range methods.All() {
		if _, listed := own[m.Full()]; m.ServedBy != daemon || listed {
			continue
		}
		out[m.Full()] = slices.Clone(own[m.Service])
		if !slices.Contains(m.Need, authv1.Role_INTERNAL) {
			out[m.Full()] = append(out[m.Full()], uid.Apid)
		}
	}
	return out
}

// A Want is what a probe must come to.
type Want struct {
	May    bool
	Answer string // exactly this one; "" is any that fits May
	maybe  bool   // what it is about need not be there
}

// Check returns "" if an answer is as wanted, else how it differs.
func (w Want) Check(answer string) string {
	switch {
	case w.Answer != "" && answer != w.Answer:
		return fmt.Sprintf("%q, want %q", answer, w.Answer)
	case w.Answer != "":
	case w.May && w.maybe && twin.Refused(answer), w.May && !w.maybe && !done(answer):
		return fmt.Sprintf("%q, and the unit says that it may", answer)
	case !w.May && done(answer):
		return fmt.Sprintf("%q, and by its unit it must not", answer)
	}
	return ""
}

// done reports whether an answer says that the attempt was let through.
func done(answer string) bool {
	return answer == twin.OK || answer == "ECONNREFUSED" || answer == "EADDRINUSE"
}

// untried are system calls that are never tried, see package twin.
var untried = []string{"rt_sigreturn", "exit", "exit_group", "vfork", "uretprobe", "number 336"}

// Want derives what becomes of a probe in a unit.
func (w *World) Want(u unit.Unit, p twin.Probe) Want {
	out := w.beyond(u, p)
	out.maybe = p.Maybe
	if out.Answer == twin.Untried || u.Syscalls == nil {
		return out
	}
	// The filter has the first word, and the only one where the very first system call is not allowed.
	first := -1
	for i, c := range p.Calls {
		if !slices.Contains(u.Syscalls, c) {
			first = i
			break
		}
	}
	if p.Family != "" && !slices.Contains(u.Sockets, p.Family) || p.Group == twin.Network && strings.HasPrefix(p.Name, "socket: ") && p.Family == "" {
		first = 0
	}
	for i, c := range p.Calls {
		if first < 0 && (c == "ioctl" && !slices.Contains(u.Ioctls, number(p, unix.TCGETS)) || c == "prctl" && !slices.Contains(u.Prctls, number(p, unix.PR_SET_VMA))) {
			first = i
		}
	}
	if p.Group == twin.Calls && p.Verb == "x32" { // the filter says that there is no such ABI
		return Want{Answer: "ENOSYS"}
	}
	if first == 0 || first > 0 && out.May || arguments(u, p) {
		return Want{Answer: twin.Filter}
	}
	if p.Group == twin.Calls && p.Name == "clone3" { // its flags lie in memory, where no filter looks: the filter says that there is no such call
		return Want{Answer: "ENOSYS"}
	}
	return out
}

// arguments reports whether the filter ends the process for the arguments of a call that it lets through with others: who starts no programs makes no
// processes and no code, nobody makes namespaces by clone, or asks for others' limits.
func arguments(u unit.Unit, p twin.Probe) bool {
	programs := unitfile.Programs(u)
	switch {
	case p.Group == twin.Calls && p.Name == "clone":
		return !programs
	case p.Group == twin.Arguments:
		return p.Verb == "namespaces" || p.Verb != "" && !programs // where there may be code, it may not be written: see beyond
	case p.Group == twin.Processes:
		return p.Calls[0] == "prlimit64"
	}
	return false
}

// number is the one of an ioctl or prctl, or that of the probe of the system call itself.
func number(p twin.Probe, of uint32) uint32 {
	if p.Number != 0 {
		return p.Number
	}
	return of
}

// beyond is what the rest of the unit says, were there no filter.
func (w *World) beyond(u unit.Unit, p twin.Probe) Want {
	switch p.Group {
	case twin.Calls:
		if slices.Contains(untried, p.Name) {
			return Want{May: true, Answer: twin.Untried}
		}
		return Want{May: true, Answer: map[bool]string{false: twin.OK}[p.Verb == "x32"]}
	case twin.Arguments:
		return Want{May: p.Verb != "exec" || u.Syscalls == nil}
	case twin.Files, twin.Devices, twin.Settings, twin.Disk:
		return Want{May: file(u, p)}
	case twin.Sockets:
		return Want{May: p.Socket == "init" || slices.Contains(w.Units[p.Socket].Listen, "unix")}
	case twin.RPCs:
		return w.rpc(u, p)
	case twin.Verbs:
		return w.verb(u, p)
	case twin.Processes:
		switch {
		case p.Unit == u.Name:
			return Want{May: true, Answer: twin.Untried}
		case p.Kind == twin.Other && u.Proc == "host":
			return Want{May: p.Path == "status" || p.Path == "cmdline"}
		}
	case twin.Identity:
		if p.Unit == u.Name && u.Name != "" {
			return Want{May: true}
		}
	case twin.Network:
		return Want{May: network(u, p)}
	case twin.Descriptors:
		return Want{May: true, Answer: strconv.FormatUint(nofile(u), 10)}
	}
	if p.Group == twin.Mounts && !u.FilesAll { // whom Landlock keeps from a file, it keeps from mounting
		return Want{}
	}
	return Want{May: !p.Nobody && able(u, p.Caps) && (p.Path == "" || file(u, p))}
}

func nofile(u unit.Unit) uint64 {
	if u.NoFile == 0 {
		return 1024
	}
	return u.NoFile
}

// able reports whether the unit has one of the capabilities; it has if none is needed.
func able(u unit.Unit, caps []string) bool {
	return len(caps) == 0 || slices.ContainsFunc(caps, func(c string) bool { return u.Capabilities&unit.Capability(c) != 0 })
}

// below reports whether a path is one of some, or in one of them.
func below(p string, folders []string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return p == f || f == "/" || strings.HasPrefix(p, f+"/") })
}

// changing are where the node's file systems are that are not read-only.
var changing = []string{"/dev", "/proc", "/run", "/state", "/sys", "/tmp", "/var"}

// file says whether a file or folder may be read, or written: it is seen, it can be reached, its mode allows it, and Landlock does.
func file(u unit.Unit, p twin.Probe) bool {
	for _, h := range u.Hide { // an empty folder, read-only, is there instead
		if below(p.Path, []string{h}) && (p.Path != h || p.Write) {
			return false
		}
	}
	if p.Nobody || !able(u, p.Caps) || p.Write && !below(p.Path, changing) {
		return false
	}
	if !u.FilesAll && !landlocked(u, p) {
		return false
	}
	switch p.Kind {
	case twin.Param:
		return !p.Write && p.Mode&0o4 != 0
	case twin.NetParam:
		return able(u, []string{"NET_ADMIN"})
	case twin.Own:
		return true
	}
	if dir := path.Dir(p.Path); p.Owner != "" && strings.HasPrefix(p.Path, unit.RunDir+"/"+p.Owner+"/") || strings.HasPrefix(p.Path, unit.StateDir+"/"+p.Owner+"/") {
		mode := uint32(0o700)
		if strings.HasPrefix(dir, unit.RunDir) {
			mode = twin.Runtime(p.Owner)
		}
		if !mode3(u, p.UserID(), mode, 1) {
			return false
		}
	}
	if p.Write {
		return mode3(u, p.UserID(), p.Mode, 2)
	}
	return mode3(u, p.UserID(), p.Mode, 4)
}

// mode3 is what the kernel makes of a mode: bit is 4 to read, 2 to write, 1 to go through. The group of what daemons make has the number of its owner.
func mode3(u unit.Unit, owner, mode, bit uint32) bool {
	switch {
	case u.Capabilities&unit.Capability("DAC_OVERRIDE") != 0:
		return true
	case u.UID == owner:
		return mode>>6&bit != 0
	case slices.Contains(u.Groups, owner):
		return mode>>3&bit != 0
	}
	return mode&bit != 0
}

// landlocked says whether Landlock lets it happen. A unit's own program is its own to read.
func landlocked(u unit.Unit, p twin.Probe) bool {
	if p.Write {
		return below(p.Path, u.Write)
	}
	return below(p.Path, u.Write) || below(p.Path, u.Read) || below(p.Path, u.Execute) || p.Path == u.Exec[0]
}

func (w *World) rpc(u unit.Unit, p twin.Probe) Want {
	list, id := w.Lists[p.Socket], uid.ID(u.UID)
	switch {
	case !list.Knows(id):
		return Want{Answer: twin.Door}
	case p.Socket != "apid" && !slices.Contains(twin.Behind(p.Socket), p.Method):
		return Want{Answer: twin.Unserved}
	case !list.Allows(id, p.Method):
		return Want{Answer: twin.List}
	}
	return Want{May: true, Answer: twin.OK}
}

func (w *World) verb(u unit.Unit, p twin.Probe) Want {
	about := w.Units[p.Unit]
	switch {
	case p.Verb == "list":
		return Want{May: true, Answer: twin.OK}
	case u.Name == "machined", p.Verb == "reboot" && u.Name == "updated":
		return Want{May: true, Answer: twin.Untried}
	case p.Verb != "logs" && slices.Contains(about.Owners, u.UID):
		return Want{May: true, Answer: twin.OK}
	}
	return Want{Answer: twin.List}
}

func network(u unit.Unit, p twin.Probe) bool {
	switch p.Verb {
	case "bind":
		return able(u, p.Caps) && (u.BindAll || slices.Contains(u.Bind, p.Port))
	case "connect":
		return u.Network == "host" && (u.ConnectAll || slices.Contains(u.Connect, p.Port))
	}
	return able(u, p.Caps)
}
