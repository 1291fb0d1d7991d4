package machined

import (
	"slices"
	"strings"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

const ptraced = `audit: type=1326 audit(1795765920.132:5): auid=4294967295 uid=104 gid=104 ses=4294967295 pid=77 comm="bulkheadd" exe="/usr/lib/bulkhead/bulkheadd" sig=31 arch=c000003e syscall=101 compat=0 ip=0x40 code=0x80000000`

func TestReadDenial(t *testing.T) {
	for _, c := range []struct {
		text string
		want denial
		ok   bool
	}{
		{ptraced, denial{77, 104, "bulkheadd", "ptrace (101)", true}, true},
		{strings.Replace(ptraced, "c000003e", "40000003", 1), denial{77, 104, "bulkheadd", "101 of 32-bit programs", true}, true},
		{strings.Replace(ptraced, "sig=31", "sig=0", 1), denial{77, 104, "bulkheadd", "ptrace (101)", false}, true},
		// Fields in a program's name do not count.
		{strings.Replace(ptraced, `"bulkheadd"`, `"x pid=1 uid=0 sig=0 syscall=3"`, 1), denial{77, 104, "x", "ptrace (101)", true}, true},
		{strings.Replace(ptraced, "pid=77", "pid=x", 1), denial{}, false},
		{strings.Replace(ptraced, "1326", "1327", 1), denial{}, false},
		{"", denial{}, false},
	} {
		if got, ok := readDenial(c.text); got != c.want || ok != c.ok {
			t.Errorf("%s: %+v, %v, want %+v", c.text, got, ok, c.want)
		}
	}
}

// A unit that was ended for a system call is named with the call: as an event, in the list of services and in its health.
func TestDenied(t *testing.T) {
	n := newNode(t)
	for i := range n.init.units {
		if u := &n.init.units[i]; u.Name == "networkd" {
			u.State, u.LastExit = "waiting", "killed by SIGSYS: a system call that its unit does not allow"
		}
	}
	d, stop := n.start()
	defer stop()
	d.noteUnit(initctl.Status{Name: "networkd", State: "starting", PID: 77, Since: time.Now()}, time.Time{})
	d.noteDenial(logs.Line{Time: time.Now(), Text: ptraced})
	if all := eventTexts(t, d); !slices.Contains(all, "networkd service: process 77 (bulkheadd) tried the system call ptrace (101), which its unit does not allow, and was ended") {
		t.Errorf("events: %q", all)
	}
	// A process that is nobody's, of a user that is no unit's: a pod.
	d.noteDenial(logs.Line{Time: time.Now(), Text: strings.Replace(strings.Replace(ptraced, "pid=77", "pid=4000", 1), "uid=104", "uid=1000", 1)})
	if all := eventTexts(t, d); strings.Contains(strings.Join(all, "\n"), "4000") {
		t.Errorf("a pod's is an event: %q", all)
	}
	const want = "killed by SIGSYS: it tried the system call ptrace (101), which its unit does not allow"
	list, err := (&machineServer{d: d}).ListServices(t.Context(), &machinev1.ListServicesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list.GetServices() {
		if s.GetName() == "networkd" && s.GetLastExit() != want {
			t.Errorf("services: %q", s.GetLastExit())
		}
	}
	found := false
	for _, c := range d.health("").GetChecks() {
		found = found || strings.Contains(c.GetDetail(), want)
	}
	if !found {
		t.Errorf("health: %v", d.health("").GetChecks())
	}
}
