package machine

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

// process is what the observer prints for each process, read from /proc.
type process struct {
	PID                               int
	Name                              string // argv[0]
	UID, GID                          []uint32
	Groups                            []uint32
	Inheritable, Permitted, Effective uint64
	Bounding, Ambient                 uint64
	NoNewPrivs, Filtered              bool // by seccomp
	Cgroup                            string
	Namespaces                        map[string]string // "net": "net:[4026531840]"
	Limits                            map[string]string // of its control group: "memory.max": "67108864"
	NoFile                            uint64
	OOMScoreAdj                       int
	PSS, RSS                          uint64 // bytes
}

// testConfinement compares every running unit's process with its unit file, exactly.
func testConfinement(t *testing.T, n *node) {
	units, err := unitfile.Load(os.DirFS(n.root))
	if err != nil {
		t.Fatal(err)
	}
	services := n.services(t)
	procs := n.observed(t)
	root := procs[1]
	if root.Name == "" {
		t.Fatalf("no process 1 among %d: the observer does not see the node", len(procs))
	}
	checked, inside := 0, 0
	workload := map[string]string{}
	for _, ns := range []string{"mnt", "pid", "cgroup"} {
		workload[ns] = procs[int(services["workload"].GetPid())].Namespaces[ns]
	}
	for _, u := range units {
		s := services[u.Name]
		if s == nil {
			t.Errorf("%s: init does not know the unit", u.Name)
			continue
		}
		if s.Pid == 0 {
			if u.Autostart {
				t.Errorf("%s is %s, want up", u.Name, s.State)
			}
			continue
		}
		p, ok := procs[int(s.Pid)]
		if !ok {
			t.Errorf("%s: process %d is gone", u.Name, s.Pid)
			continue
		}
		for _, diff := range compare(u, p, root) {
			t.Errorf("%s: %s", u.Name, diff)
		}
		for ns, theirs := range workload {
			if lives := u.Inside == "workload" || u.Name == "workload"; lives != (p.Namespaces[ns] == theirs) || !lives && ns != "mnt" && p.Namespaces[ns] != root.Namespaces[ns] {
				t.Errorf("%s is in namespace %s, the workload side in %s, PID 1 in %s", u.Name, p.Namespaces[ns], theirs, root.Namespaces[ns])
			}
		}
		if u.Inside != "" {
			inside++
		}
		checked++
	}
	t.Logf("» %d processes are exactly as confined as their units say", checked)
	if checked < 12 || inside < 3 {
		t.Errorf("only %d units run, %d on the workload side", checked, inside)
	}
	if weight := strings.TrimSpace(n.act(t, "GET", "group", "", "unit=workload", "file=cpu.weight")); weight != "1000" {
		t.Errorf("the workload side's cpu.weight is %s", weight)
	}
}

// compare says how a process differs from its unit.
func compare(u unit.Unit, p, root process) (diffs []string) {
	want := func(what string, got, want any) {
		if fmt.Sprint(got) != fmt.Sprint(want) {
			diffs = append(diffs, fmt.Sprintf("%s is %v, the unit says %v", what, got, want))
		}
	}
	ids := []uint32{u.UID, u.UID, u.UID, u.UID}
	want("uid", p.UID, ids)
	want("gid", p.GID, ids)
	groups, wantGroups := slices.Sorted(slices.Values(p.Groups)), slices.Sorted(slices.Values(u.Groups))
	want("groups", groups, wantGroups)
	want("permitted", hex(p.Permitted), hex(u.Capabilities))
	want("effective", hex(p.Effective), hex(u.Capabilities))
	want("bounding", hex(p.Bounding), hex(u.Capabilities))
	if u.UID != 0 {
		want("inheritable", hex(p.Inheritable), hex(u.Capabilities))
		want("ambient", hex(p.Ambient), hex(u.Capabilities))
	}
	want("NoNewPrivs", p.NoNewPrivs, !u.NewPrivileges)
	want("filtered", p.Filtered, u.Syscalls != nil) // what it lets pass, internal/unit/unitfile knows
	want("own mount namespace", p.Namespaces["mnt"] != root.Namespaces["mnt"], true)
	want("own network namespace", p.Namespaces["net"] != root.Namespaces["net"], u.Network == "none")
	group := "/bulkhead/" + u.Group()
	if u.Holds { // a leaf of it: its limits are those of all that live inside
		group += "/hold"
		u.CPUWeight = 0
	}
	want("control group", strings.TrimPrefix(p.Cgroup, "0::"), group)
	limit := func(file string, n uint64, none string) {
		w := none
		if n > 0 {
			w = fmt.Sprint(n)
		}
		want(file, p.Limits[file], w)
	}
	limit("memory.max", u.MemoryMax, "max")
	limit("pids.max", u.PidsMax, "max")
	limit("cpu.weight", u.CPUWeight, "100")
	nofile := u.NoFile
	if nofile == 0 {
		nofile = 1024
	}
	want("RLIMIT_NOFILE", p.NoFile, nofile)
	want("oom_score_adj", p.OOMScoreAdj, u.OOMScoreAdj)
	return diffs
}

func hex(mask uint64) string { return fmt.Sprintf("%016x", mask) }

// testFlippedBit changes one bit of the root partition under the running system: reading it must fail, and must never give the changed bytes.
func testFlippedBit(t *testing.T, n *node) {
	disk, err := os.OpenFile(n.machineDir()+"/disk.raw", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	var parts []struct {
		Label                 string
		StartBytes, SizeBytes json.Number
	}
	if err := json.Unmarshal([]byte(n.run(t, "bhctl", "get", "partitions", "-o", "json")), &parts); err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		if p.Label != "ROOT-A" {
			continue
		}
		start, _ := p.StartBytes.Int64()
		read := func(offset int64) (string, error) {
			return n.try(t.Context(), time.Minute, "kubectl", "exec", "-n", "kube-system", "inspect", "--", "/hello", "read", "/dev/dm-0", fmt.Sprint(offset), "4096")
		}
		const offset = 64 << 20                                                      // inside the image, a block that nothing has read by chance alone
		eventually(t, 2*time.Minute, "an unharmed block can be read", func() error { // all pods were started anew, if the workload side was killed before
			_, err := read(offset - 1<<20)
			return err
		})
		b := make([]byte, 1)
		if _, err := disk.ReadAt(b, start+offset+100); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x10
		if _, err := disk.WriteAt(b, start+offset+100); err != nil {
			t.Fatal(err)
		}
		out, err := read(offset)
		if err == nil {
			t.Fatalf("the changed block was read: %.80s", out)
		}
		if !strings.Contains(err.Error(), "input/output error") {
			t.Errorf("reading the changed block: %v, want an input/output error", err)
		}
		if log := n.run(t, "bhctl", "dmesg"); !strings.Contains(log, "is corrupted") {
			t.Error("the kernel's log does not name the corrupted block")
		}
		if _, err := read(offset - 1<<20); err != nil {
			t.Errorf("other blocks fail too: %v", err)
		}
		return
	}
	t.Fatalf("no partition ROOT-A among %v", parts)
}
