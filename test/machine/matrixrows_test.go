package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/test/twin"
)

// daemons are ours; workers are what runs below them and can be taken away too. Not the API server: when all its clients come back at once, an emulated machine takes
// it longer to start than the minute that it gives itself, and it ends by itself and begins anew, for minutes.
var (
	daemons = []string{"apid", "etcdd", "gateway", "kubeletd", "machined", "networkd", "storaged", "trustd", "updated"}
	workers = []string{"containerd", "kubelet", "kube-proxy", "kube-controller-manager", "kube-scheduler"}
)

// stopTime is how long a stopped daemon is left so.
const stopTime = 30 * time.Second

// blows are all rows, in the order in which they are done.
func blows() (rows []blow) {
	rows = append(rows, full("VAR")) // first, for the kubelet tells of it for five minutes more
	for _, name := range slices.Concat(daemons, workers) {
		rows = append(rows, killed(name))
	}
	for _, names := range [][]string{{"networkd", "gateway", "storaged", "updated", "kubeletd"}, {"trustd", "kubelet"}, {"etcdd", "containerd"}, {"machined"}, {"apid"}} {
		rows = append(rows, stopped(names...))
	}
	for _, name := range daemons {
		rows = append(rows, exhausted(name))
	}
	for _, name := range daemons {
		rows = append(rows, flooded(name))
	}
	rows = append(rows, full("STATE"))
	for _, r := range [][2]string{
		{"gateway", "apid"}, {"apid", "trustd"}, {"machined", "storaged"}, {"networkd", "machined"}, {"storaged", "trustd"}, {"trustd", "etcdd"},
		{"etcdd", "trustd"}, {"kubeletd", "networkd"}, {"updated", "storaged"},
	} {
		rows = append(rows, alone(r[0], r[1]))
	}
	return rows
}

// settles is how long a unit's trouble may need to show afterwards: a kubelet that stood still tells seconds later that containerd was down, and a kube-proxy takes the
// rules of its last life over some seconds after its start, when Services would end if it did not understand them.
func settles(unit string) time.Duration {
	switch unit {
	case "containerd", "kubelet", "kube-proxy":
		return 15 * time.Second
	case "kubeletd":
		return 5 * time.Second
	}
	return 0
}

// mute is who cannot answer while a unit does not: most calls go through apid.
func mute(unit string) []string {
	if unit == "apid" {
		return slices.DeleteFunc(slices.Clone(daemons), func(s string) bool { return s == "gateway" })
	}
	return []string{unit}
}

// silentWhy is what bhctl why says while a unit is there and does not answer. Without apid and machined nobody can be asked; the call's error says who is missing.
func silentWhy(unit string) []string {
	switch unit {
	case "apid":
		return []string{"did not answer in time"}
	case "machined":
		return []string{"machined has not answered for"}
	case "kubelet":
		return []string{unit}
	case "containerd": // the kubelet says so after half a minute, when the Node is not Ready any more: nobody else notices
		return nil
	}
	return []string{unit + ".answers", "it hangs"}
}

// signal sends a signal to a unit's main process.
func (n *node) signal(t *testing.T, unit, signal string) {
	t.Helper()
	n.act(t, "POST", "signal", "", fmt.Sprintf("pid=%d", n.services(t)[unit].GetPid()), "signal="+signal)
}

// killed: the unit is back at once, and no call fails, not even its own. A request to the gateway that is under way ends with its connection.
func killed(unit string) blow {
	f := blow{name: unit + " killed", why: []string{unit + ".up", "it ended (killed by SIGKILL) and was started again"}, calm: settles(unit),
		strike: func(t *testing.T, n *node) { n.signal(t, unit, "KILL") }}
	if unit == "gateway" {
		f.excused = []string{unit}
	}
	return f
}

// stopped: callers hear within their time who does not answer, and why says that it hangs.
func stopped(units ...string) blow {
	f := blow{name: strings.Join(units, " and ") + " stopped", lasts: stopTime}
	pids := map[string]uint32{}
	for _, u := range units {
		f.excused = append(f.excused, mute(u)...)
		f.why = append(f.why, silentWhy(u)...)
		f.calm = max(f.calm, settles(u))
		if slices.Contains(daemons, u) && u != "apid" && u != "gateway" {
			f.named = append(f.named, u)
		}
	}
	f.strike = func(t *testing.T, n *node) {
		all := n.services(t)
		for _, u := range units {
			pids[u] = all[u].GetPid()
			n.act(t, "POST", "signal", "", fmt.Sprintf("pid=%d", pids[u]), "signal=STOP")
		}
	}
	f.relieve = func(t *testing.T, n *node) {
		for _, u := range units {
			n.act(t, "POST", "signal", "", fmt.Sprintf("pid=%d", pids[u]), "signal=CONT")
		}
	}
	return f
}

// exhausted: the kernel ends the unit by its memory limit, which is told as the reason; else as killed.
func exhausted(unit string) blow {
	f := killed(unit)
	f.name = unit + " out of memory"
	f.why = []string{unit + ".up", "it ran into its memory limit of"}
	f.strike = func(t *testing.T, n *node) {
		t.Logf("killed at %s bytes", strings.TrimSpace(n.act(t, "POST", "exhaust", "", "unit="+unit)))
	}
	return f
}

// floodUser is a daemon that may call the daemon's socket, besides apid and machined: taken over, it floods it.
var floodUser = map[string]int{"apid": 103, "etcdd": 110, "gateway": 101, "kubeletd": 109, "machined": 108, "networkd": 110, "storaged": 108, "trustd": 110, "updated": 106}

// flooded: strangers with garbage, and another daemon with connections on which nothing ends, take no other caller's place.
func flooded(unit string) blow {
	return blow{name: unit + " flooded", lasts: 3 * time.Second, why: []string{"the node is well"},
		strike: func(t *testing.T, n *node) {
			for _, kind := range []string{"kind=garbage as=65534", "kind=idle as=65534", fmt.Sprintf("kind=half as=%d", floodUser[unit])} {
				out := n.act(t, "POST", "flood", "", append(strings.Fields(kind), "unit="+unit, "connections=300")...)
				var f struct{ Connected int }
				if err := json.Unmarshal([]byte(out), &f); err != nil || f.Connected < 300 {
					t.Errorf("%s: %v, %s", kind, err, out)
				}
			}
		},
		relieve: func(t *testing.T, n *node) {
			t.Logf("the flood ends: %s", strings.TrimSpace(n.act(t, "DELETE", "flood", "")))
		},
	}
}

// full: it is told, what runs goes on, and with room again all is as before. The last blocks of VAR are etcd's: it goes on writing.
func full(volume string) blow {
	f := blow{name: volume + " full", why: []string{"storaged." + volume + ".room", volume + " is full"}, lasts: 12 * time.Second,
		strike: func(t *testing.T, n *node) {
			t.Logf("filled with %s bytes", strings.TrimSpace(n.act(t, "POST", "fill", "", "volume="+volume)))
		},
		relieve: func(t *testing.T, n *node) { n.act(t, "DELETE", "fill", "", "volume="+volume) },
	}
	if volume == "VAR" {
		f.meanwhile = func(t *testing.T, n *node) {
			conn := n.connect(t)
			for range 20 {
				if _, err := trustv1.NewMembershipClient(conn).MakeJoinToken(t.Context(), &trustv1.MakeJoinTokenRequest{Role: "worker", TtlSeconds: 60}); err != nil {
					t.Errorf("etcd takes nothing any more: %v", err)
				}
			}
		}
	}
	return f
}

// alone: the unit is ended in order and started anew while what it depends on stands still. Whoever needs neither is served; when that goes on, the unit is as before.
func alone(unit, on string) blow {
	group := func(t *testing.T, n *node, state string) {
		n.act(t, "PUT", "group", state, "unit="+on, "file=cgroup.freeze")
	}
	f := blow{name: unit + " without " + on, excused: append(mute(on), mute(unit)...), lasts: 6 * time.Second, calm: max(settles(unit), settles(on)), why: silentWhy(on),
		strike: func(t *testing.T, n *node) {
			group(t, n, "1")
			n.act(t, "POST", "restart", "", "unit="+unit)
		},
		relieve: func(t *testing.T, n *node) { group(t, n, "0") },
	}
	if unit == "machined" || unit == "apid" { // who is asked is not there
		f.why = nil
	}
	return f
}

// Every daemon is in each kind of row that it can be in.
func TestMatrixIsWhole(t *testing.T) {
	if all := twin.Daemons(); !slices.Equal(daemons, all) { // which the units are compared with
		t.Errorf("the matrix has %v, the node %v", daemons, all)
	}
	seen := map[string]bool{}
	for _, f := range blows() {
		if seen[f.name] {
			t.Errorf("two rows are called %q", f.name)
		}
		seen[f.name] = true
	}
	has := func(parts ...string) bool {
		for name := range seen {
			if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(name, p) }) {
				return true
			}
		}
		return false
	}
	var missing []error
	for _, d := range daemons {
		for _, kind := range []string{d + " killed", d + " out of memory", d + " flooded", d + " without "} {
			if !has(kind) {
				missing = append(missing, errors.New(kind))
			}
		}
		if !has(d, "stopped") {
			missing = append(missing, errors.New(d+" stopped"))
		}
	}
	if len(missing) > 0 {
		t.Errorf("no row: %v", missing)
	}
}
