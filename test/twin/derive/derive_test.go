package derive

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/test/twin"
)

func world(t *testing.T) *World {
	t.Helper()
	w, err := New(os.DirFS("../../.."))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// TestKnown holds what the twins know of a node, which reads no unit file, to the units and the lists of callers. Who adds a daemon, a folder or a service
// hears here what package twin does not try yet.
func TestKnown(t *testing.T) {
	w := world(t)
	var daemons, others []string
	for name, u := range w.Units {
		if strings.HasPrefix(u.Exec[0], "/usr/lib/bulkhead/") && slices.Contains(uid.Names(), name) {
			daemons = append(daemons, name)
		} else {
			others = append(others, name)
		}
		if slices.Contains(twin.Daemons(), name) && twin.Runtime(name) != u.Runtime {
			t.Errorf("%s: its folder has mode %#o, package twin says %#o", name, u.Runtime, twin.Runtime(name))
		}
	}
	slices.Sort(daemons)
	slices.Sort(others)
	if !slices.Equal(daemons, twin.Daemons()) || !slices.Equal(others, twin.Others()) {
		t.Errorf("units are %v and %v, package twin has %v and %v", daemons, others, twin.Daemons(), twin.Others())
	}
	for _, m := range methods.All() {
		if _, known := twin.Internal[m.Service]; m.ServedBy == "" && m.Service != "access.v1.Access" && !known {
			t.Errorf("%s: package twin does not know whose socket has it", m.Full())
		}
	}
	for _, d := range twin.Daemons() {
		if w.Lists[d] == nil {
			t.Errorf("%s: its list of callers is not known", d)
		}
		for key := range w.Lists[d] {
			service, _, _ := strings.Cut(strings.TrimPrefix(key, "/"), "/")
			if !slices.ContainsFunc(twin.Behind(d), func(m string) bool { return strings.HasPrefix(m, "/"+service+"/") }) {
				t.Errorf("%s: its list has %s, package twin tries no method of it", d, key)
			}
		}
	}
}

// TestProbes: enough, each with a name of its own, and what is derived for some of them by hand.
func TestProbes(t *testing.T) {
	w := world(t)
	seen := map[string]twin.Probe{}
	for _, p := range twin.Probes() {
		if _, twice := seen[p.ID()]; twice {
			t.Errorf("%s is there twice", p.ID())
		}
		if !slices.Contains(twin.Groups(), p.Group) {
			t.Errorf("%s: no such group", p.ID())
		}
		seen[p.ID()] = p
	}
	if len(seen) < 300 {
		t.Errorf("%d probes, want 300", len(seen))
	}
	t.Logf("» %d probes", len(seen))
	for _, c := range []struct {
		unit, id string
		may      bool
		answer   string
	}{
		{"machined", "files: list /run/bulkhead/trustd", false, ""},
		{"trustd", "files: list /run/bulkhead/trustd", true, ""},
		{"gateway", "files: list /state/trustd", false, ""},
		{"gateway", "calls of daemons: trustd/trust.v1.Signer/SignCertificate", true, twin.OK},
		{"gateway", "calls of daemons: trustd/trust.v1.Trust/Bootstrap", false, twin.List},
		{"gateway", "calls of daemons: storaged/slot.v1.Slots/Begin", false, twin.Door},
		{"updated", "calls of daemons: storaged/slot.v1.Slots/Begin", true, twin.OK},
		{"apid", "calls of daemons: machined/machine.v1.Machine/Reboot", true, twin.OK},
		{"apid", "calls of daemons: machined/machine.v1.Machine/TellEvent", false, twin.List},
		{"machined", "orders to PID 1: stop apid", true, twin.Untried},
		{"apid", "orders to PID 1: stop machined", false, twin.List},
		{"kubeletd", "orders to PID 1: stop kubelet", true, twin.OK},
		{"storaged", "mounts: mount a tmpfs", true, ""},
		{"trustd", "mounts: mount a tmpfs", false, ""},
		{"networkd", "network: socket: raw ICMP", true, ""},
	} {
		p, ok := seen[c.id]
		if !ok {
			t.Errorf("no probe %q", c.id)
			continue
		}
		u := w.Units[c.unit]
		u.Syscalls, u.FilesAll = nil, true
		if got := w.Want(u, p); got.May != c.may || got.Answer != c.answer {
			t.Errorf("%s: %s: %+v, want %v %q", c.unit, c.id, got, c.may, c.answer)
		}
	}
}

// TestFilterFirst: what the filter does not let through ends the process, whatever else is allowed.
func TestFilterFirst(t *testing.T) {
	w := world(t)
	u := w.Units["storaged"]
	u.Syscalls, u.Sockets = []string{"mount", "openat", "socket", "umount2"}, []string{"unix"}
	for _, p := range twin.Probes() {
		want := map[string]string{
			"modules, programs in the kernel, the machine: set the clock": twin.Filter, "mounts: mount a tmpfs": "", "network: socket: TCP": twin.Filter, "network: socket: CAN": twin.Filter,
			"network: socket: unix, stream": "", "files: list /run/bulkhead/storaged": twin.Filter, "system calls: mount": twin.OK, "system calls: vfork": twin.Untried, "system calls: ptrace": twin.Filter,
		}
		if answer, ok := want[p.ID()]; ok && w.Want(u, p).Answer != answer {
			t.Errorf("%s: %+v, want %q", p.ID(), w.Want(u, p), answer)
		}
	}
}

// TestComplete holds the derivation of a daemon's whole list to the code that makes it.
func TestComplete(t *testing.T) {
	w := world(t)
	for _, c := range []struct {
		daemon, method string
		who            []uid.ID
	}{
		{"machined", "/machine.v1.Machine/GetHealth", []uid.ID{uid.Apid, uid.Updated}},
		{"machined", "/machine.v1.Machine/Why", []uid.ID{uid.Apid}},
		{"storaged", "/storage.v1.Disposal/Destroy", []uid.ID{uid.Machined}},
		{"trustd", "/trust.v1.Signer/WatchTrust", []uid.ID{uid.Apid, uid.Gateway, uid.Etcdd, uid.Kubeletd}},
		{"gateway", "/control.v1.Control/SetSpec", []uid.ID{uid.Machined}},
	} {
		for _, name := range uid.Names() {
			id, _ := uid.Lookup(name)
			if got, want := w.Lists[c.daemon].Allows(id, c.method), slices.Contains(c.who, id); got != want {
				t.Errorf("%s: %s may call %s: %v, want %v", c.daemon, name, c.method, got, want)
			}
		}
	}
}
