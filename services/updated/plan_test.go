package updated

import (
	"strings"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// checks makes a node's health of words: "x" passes, "!x: why" does not.
func checks(words ...string) (out []*machinev1.Check) {
	for _, w := range words {
		name, bad := strings.CutPrefix(w, "!")
		name, detail, _ := strings.Cut(name, ": ")
		out = append(out, &machinev1.Check{Name: name, Ok: !bad, Detail: detail})
	}
	return out
}

// healthy is a control-plane node that does its job.
func healthy(but ...string) []*machinev1.Check {
	all := []string{"api.answered", "config.applied", "apid.up", "kubelet.up", "networkd.converged", "etcd.converged", "kubernetes.converged", "!updated.converged: working"}
	for i, w := range all {
		for _, b := range but {
			if name, _, _ := strings.Cut(strings.TrimPrefix(b, "!"), ": "); name == w {
				all[i] = b
			}
		}
	}
	return checks(all...)
}

func slots(running string, status [2]string, versions ...string) *slotv1.GetResponse {
	r := &slotv1.GetResponse{Epoch: 2, EpochFloor: 1}
	for i, st := range status {
		v := &slotv1.Slot{Name: string(rune('A' + i)), Status: st, RootHash: strings.Repeat(string(rune('a'+i)), 64)}
		if i < len(versions) {
			v.Version, v.Running, v.Sequence, v.Epoch = versions[i], versions[i] == running, uint32(i+1), 2
		}
		r.Slots = append(r.Slots, v)
	}
	return r
}

func TestPlan(t *testing.T) {
	want := *config.Defaults().Update
	trial := slots("0.2.0", [2]string{"good", "on trial"}, "0.1.0", "0.2.0")
	kept := slots("0.2.0", [2]string{"good", "good"}, "0.1.0", "0.2.0")
	kept.EpochKept = true
	raised := slots("0.2.0", [2]string{"good", "good"}, "0.1.0", "0.2.0")
	raised.EpochKept, raised.EpochFloor = true, 2
	worker := want
	worker.Health = []config.Proof{config.ProofAPI, config.ProofServices, config.ProofConfig, config.ProofKubelet}
	for _, c := range []struct {
		what  string
		want  config.Update
		state State
		steps string
	}{
		{"nothing known", want, State{}, ""},
		{"no boot loader", want, State{NoSlots: "not started by UEFI"}, ""},
		{"good", want, State{Slots: slots("0.1.0", [2]string{"good", "empty"}, "0.1.0")}, ""},
		{"good, the epoch is to be raised", want, State{Slots: kept}, "raise epoch 2"},
		{"good, the epoch is raised", want, State{Slots: raised}, ""},
		{"good, no TPM", want, State{Slots: slots("0.2.0", [2]string{"good", "good"}, "0.1.0", "0.2.0")}, ""},
		{"given up", want, State{Slots: slots("0.2.0", [2]string{"good", "given up"}, "0.1.0", "0.2.0"), Uptime: time.Hour}, ""},
		{"on trial, nothing known", want, State{Slots: trial}, "prove api: the node's health is not known yet; prove services: the node's health is not known yet; " +
			"prove config: the node's health is not known yet; prove kubelet: the node's health is not known yet; prove etcd: the node's health is not known yet"},
		{"on trial, healthy", want, State{Slots: trial, Checks: healthy()}, "mark good 0.2.0"},
		{"on trial, healthy, late", want, State{Slots: trial, Checks: healthy(), Uptime: time.Hour}, "mark good 0.2.0"},
		{"on trial, no call yet", want, State{Slots: trial, Checks: healthy("!api.answered: none")}, "prove api: api.answered: none"},
		{"on trial, a unit restarts", want, State{Slots: trial, Checks: healthy("!kubelet.up: waiting", "!apid.up: waiting")}, "prove services: apid.up: waiting (and 1 more)"},
		{"on trial, no etcd", want, State{Slots: trial, Checks: healthy("!etcd.converged: left to do: wait for member")}, "prove etcd: etcd.converged: left to do: wait for member"},
		{"on trial, not Ready", want, State{Slots: trial, Checks: healthy("!kubernetes.converged: ")}, "prove kubelet: kubernetes.converged: no"},
		{"on trial, a section is not done", want, State{Slots: trial, Checks: healthy("!networkd.converged: no carrier")}, "prove config: networkd.converged: no carrier"},
		{"on trial, a volume is full", want, State{Slots: trial, Checks: append(healthy(), checks("!volumes.VAR: 98 % full")...)}, "mark good 0.2.0"},
		{"on trial, PID 1 is silent", want, State{Slots: trial, Checks: append(healthy(), checks("!init.answers: timeout")...)}, "prove services: init.answers: timeout"},
		{"on trial, checks are missing", want, State{Slots: trial, Checks: checks("api.answered", "config.applied", "apid.up")},
			"prove kubelet: the node does not report it; prove etcd: the node does not report it"},
		{"a worker on trial", worker, State{Slots: trial, Checks: healthy("!etcd.converged: none here")}, "mark good 0.2.0"},
		{"on trial, time is over", want, State{Slots: trial, Checks: healthy("!etcd.converged: no leader"), Uptime: 10 * time.Minute},
			"prove etcd: etcd.converged: no leader; restart 0.2.0 did not prove its health in 10m0s; missing: etcd: etcd.converged: no leader"},
		{"on trial, time is over, two things miss", want, State{Slots: trial, Checks: healthy("!etcd.converged: no leader", "!kubernetes.converged: waits"), Uptime: 10 * time.Minute},
			"prove kubelet: kubernetes.converged: waits; prove etcd: etcd.converged: no leader; restart 0.2.0 did not prove its health in 10m0s; missing: etcd: etcd.converged: no leader; kubelet: kubernetes.converged: waits"},
	} {
		steps, err := plan(c.want, c.state)
		var got []string
		for _, s := range steps {
			got = append(got, s.String())
		}
		if strings.Join(got, "; ") != c.steps || err != nil {
			t.Errorf("%s: %v\ngot  %s\nwant %s", c.what, err, strings.Join(got, "; "), c.steps)
		}
	}
	// A version that has had all its time once gets less in the tries after that, and never more than it was given.
	for _, c := range []struct {
		minutes int
		late    bool
		want    time.Duration
	}{{10, false, 10 * time.Minute}, {10, true, retryPatience}, {1, false, time.Minute}, {1, true, time.Minute}} {
		for _, up := range []time.Duration{c.want - 1, c.want} {
			steps, _ := plan(config.Update{Health: want.Health, Patience: c.minutes}, State{Slots: trial, Checks: healthy("!etcd.converged: no leader"), Uptime: up, Late: c.late})
			if got := steps[len(steps)-1].Op == opRestart; got != (up == c.want) {
				t.Errorf("%d minutes, late %v: restart %v after %s", c.minutes, c.late, got, up)
			}
		}
	}
	// Before the configuration is known, a version is not good, and it is left.
	steps, _ := planBare(State{Slots: trial, Checks: healthy("!config.applied: none"), Uptime: 11 * time.Minute})
	if len(steps) != 2 || steps[1].Op != opRestart {
		t.Errorf("without a configuration: %v", steps)
	}
	// One whose STATE does not open, though it should by itself, sooner; one that waits for a person, not.
	for _, c := range []struct {
		check string
		want  bool
	}{{"!storaged.STATE.unlocks: STATE is locked (tpm: …)", true}, {"!storaged.STATE.unlocked: STATE is locked (only keys that people have)", false}, {"storaged.STATE.unlocks", false}} {
		steps, _ := planBare(State{Slots: trial, Checks: checks(c.check), Uptime: lockedPatience})
		if got := len(steps) > 0 && steps[len(steps)-1].Op == opRestart; got != c.want {
			t.Errorf("%s: restart %v after %s", c.check, got, lockedPatience)
		}
	}
}

func TestExplain(t *testing.T) {
	v := &slotv1.Slot{Version: "0.2.0", RootHash: "abc", Sequence: 2, Status: "failed", TriesDone: 3}
	mine := func(edit func(*trial)) *trial {
		x := &trial{Version: "0.2.0", Root: "abc", Sequence: 2, Try: 3, Time: time.Date(2026, 4, 30, 23, 50, 0, 0, time.UTC), Uptime: 42*time.Second + time.Millisecond, Missing: "kubelet: not Ready", Lines: []string{"[ 1.0] a", "[ 2.0] b"}}
		if edit != nil {
			edit(x)
		}
		return x
	}
	const fell = "VFS: Unable to mount root fs"
	at := func(end machinev1.Boot_End, detail string) ending {
		e := ending{boot: &machinev1.Boot{End: end, Detail: detail}}
		if end == machinev1.Boot_PANIC {
			e.lines = []string{"[ 3.0] before", "[ 3.1] Kernel panic"}
		}
		return e
	}
	ended := func(x *trial) { x.End = "0.2.0 did not prove its health in 10m0s; missing: kubelet: not Ready" }
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		what  string
		trial *trial
		end   ending
		want  string
		lines string
	}{
		{"panic", nil, at(machinev1.Boot_PANIC, fell), "the kernel panicked: " + fell, "[ 3.0] before|[ 3.1] Kernel panic"},
		{"panic after STATE", mine(nil), at(machinev1.Boot_PANIC, fell), "the kernel panicked: " + fell, "[ 3.0] before"},
		{"panic in the last try, an earlier one ended with a reason", mine(func(x *trial) { ended(x); x.Try = 2 }), at(machinev1.Boot_PANIC, fell), "the kernel panicked: " + fell, "[ 3.0]"},
		{"PID 1 left it", mine(nil), at(machinev1.Boot_PANIC, "PID 1 gave up: cannot keep this version: nobody has judged it for 90 s"), "nobody has judged it for 90 s", "[ 3.0]"},
		{"PID 1 gave up", nil, at(machinev1.Boot_PANIC, "PID 1 gave up: cannot mount the root: input/output error"), "PID 1 gave up: cannot mount the root: input/output error", "[ 3.0]"},
		{"never healthy", mine(ended), at(machinev1.Boot_UNKNOWN, "no trace"), "0.2.0 did not prove its health in 10m0s; missing: kubelet: not Ready", "[ 1.0] a|[ 2.0] b"},
		{"never healthy, then cut", mine(func(x *trial) { ended(x); x.Try = 2 }), at(machinev1.Boot_UNKNOWN, "no trace"), "0.2.0 did not prove its health in 10m0s; missing: kubelet: not Ready", "[ 1.0] a"},
		{"cut", mine(nil), at(machinev1.Boot_UNKNOWN, "no trace"), "its last try stopped without a word 42s after its start, by a hang or a reset; missing then: kubelet: not Ready", "[ 1.0] a"},
		{"hang", mine(nil), at(machinev1.Boot_RESET, "the watchdog"), "its last try hung, and the hardware watchdog reset the machine; its last sign of life was 42s after its start; missing then: kubelet: not Ready", "[ 1.0] a"},
		{"early hang", nil, at(machinev1.Boot_RESET, "the watchdog"), "it hung before it could write to STATE, and the hardware watchdog reset the machine", ""},
		{"no trace", nil, at(machinev1.Boot_CLEAN, "reboot ordered by ann"), "no try got as far as STATE: it was refused by the firmware, or hung or was reset before", ""},
		{"nothing known", nil, ending{}, "no try got as far as STATE: it was refused by the firmware, or hung or was reset before", ""},
		{"another version's trace", mine(func(x *trial) { x.Sequence = 1 }), ending{}, "no try got as far as STATE: it was refused by the firmware, or hung or was reset before", ""},
		{"several lines", mine(func(x *trial) { x.End = "missing: kubelet: one\nand two" }), ending{}, "missing: kubelet: one and two", ""},
		{"a clock years ahead", mine(func(x *trial) { ended(x); x.Time = now.AddDate(30, 0, 0) }), ending{}, "0.2.0 did not prove its health in 10m0s; missing: kubelet: not Ready; its clock was wrong: it said 2056-05-01 00:00:00", ""},
		{"a clock years behind", mine(func(x *trial) { ended(x); x.Time = time.Unix(60, 0) }), ending{}, "0.2.0 did not prove its health in 10m0s; missing: kubelet: not Ready; its clock was wrong: it said 1970-01-01 00:01:00", ""},
	} {
		j := journal{Trial: c.trial, History: []event{{Time: now.Add(-time.Hour), What: "installed", Version: "0.2.0"}}}
		f := explain(v, j, c.end, now)
		if f.Reason != c.want || !strings.HasPrefix(strings.Join(f.Lines, "|"), c.lines) || f.Tries != 3 || f.Version != "0.2.0" {
			t.Errorf("%s: got %q with %q", c.what, f.Reason, f.Lines)
		}
	}
}

func TestLeft(t *testing.T) {
	s := State{Slots: slots("0.1.0", [2]string{"good", "failed"}, "0.1.0", "0.2.0")}
	v := left(s, journal{})
	if v.GetVersion() != "0.2.0" {
		t.Fatalf("left: %v", v)
	}
	f := explain(v, journal{}, ending{}, time.Now())
	if v := left(s, journal{Failure: &f}); v != nil {
		t.Errorf("explained, and found again: %v", v)
	}
	s.Slots.Slots[1].Sequence = 9 // installed once more, and failed again
	if v := left(s, journal{Failure: &f}); v == nil {
		t.Error("the second failure of a version is not seen")
	}
	if v := left(State{Slots: slots("0.2.0", [2]string{"good", "failed"}, "0.1.0", "0.2.0")}, journal{}); v != nil {
		t.Errorf("what runs was left: %v", v)
	}
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	if j, err := readJournal(dir); err != nil || len(j.History) != 0 {
		t.Errorf("no journal: %v, %v", j, err)
	}
	var j journal
	for i := range 2 * maxHistory {
		j.say(event{What: "installed", Version: "0.0." + string(rune('0'+i%10)), Detail: strings.Repeat("ä", maxLine)})
	}
	j.Trial = &trial{Version: "0.2.0", Lines: tail(make([]string, 3*maxLines))}
	if err := j.write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := readJournal(dir)
	if err != nil || len(got.History) != maxHistory || len(got.History[0].Detail) > maxLine || len(got.Trial.Lines) != maxLines || got.Format != journalFormat {
		t.Errorf("read again: %v, %d of history, %d lines, %d bytes", err, len(got.History), len(got.Trial.Lines), len(got.History[0].Detail))
	}
}

func TestReference(t *testing.T) {
	const digest = "@sha256:0123456789012345678901234567890123456789012345678901234567890123"
	for text, want := range map[string]string{
		"registry.example.org/bulkhead":                   "registry.example.org/bulkhead:latest https://registry.example.org/v2/bulkhead latest",
		"oci://registry.example.org:5000/a/b_c/d-e:1.2.3": "registry.example.org:5000/a/b_c/d-e:1.2.3 https://registry.example.org:5000/v2/a/b_c/d-e 1.2.3",
		"127.0.0.1:5000/x:v1":                             "127.0.0.1:5000/x:v1 http://127.0.0.1:5000/v2/x v1",
		"[::1]:5000/x":                                    "[::1]:5000/x:latest http://[::1]:5000/v2/x latest",
		"localhost/x:1" + digest:                          "localhost/x:1" + digest + " http://localhost/v2/x " + digest[1:],
		"r.example/x" + digest:                            "r.example/x" + digest + " https://r.example/v2/x " + digest[1:],
	} {
		r, err := parseReference(text)
		if got := r.String() + " " + r.base() + " " + r.version(); err != nil || got != want {
			t.Errorf("%s: %v\ngot  %s\nwant %s", text, err, got, want)
		}
	}
	for _, bad := range []string{"", "bulkhead", "bulkhead:1", "library/bulkhead", "r.example/", "r.example/A", "r.example/a//b", "r.example/../b", "r.example/a:", "r.example/a:b c",
		"r.example/a@sha256:12", "user@r.example/a", "https://r.example/a", "r.example/a?b", "r.example:99999999/a", "r.example/" + strings.Repeat("a", 600)} {
		if r, err := parseReference(bad); err == nil {
			t.Errorf("%q is read as %v", bad, r)
		}
	}
}

func FuzzReference(f *testing.F) {
	f.Add("oci://registry.example.org:5000/a/b:1.2.3")
	testfuzz.Run(f, func(t *testing.T, s string) {
		r, err := parseReference(s)
		if err != nil {
			return
		}
		if again, err := parseReference(r.String()); err != nil || again != r {
			t.Errorf("%q: %+v, read again as %+v, %v", s, r, again, err)
		}
	})
}

func TestRuns(t *testing.T) {
	head, _ := testImage(t, "0.2.0", 2<<20)
	m := head.Manifest
	n := len(m.Files[1].Chunks)
	r := func(file, first, count int) *slotv1.Range {
		return &slotv1.Range{File: uint32(file), First: uint32(first), Count: uint32(count)}
	}
	missing := []*slotv1.Range{r(0, 0, 1), r(1, 0, 2), r(1, 3, 1), r(1, n-1, 1)}
	got := runs(m, missing, true)
	if len(got) != 3 || got[1] != (run{1, 0, 4}) || got[2] != (run{1, n - 1, n}) {
		t.Errorf("in pieces: %v", got)
	}
	if got := runs(m, missing, false); len(got) != 2 || got[1] != (run{1, 0, n}) {
		t.Errorf("in one go: %v", got)
	}
	for _, bad := range []*slotv1.Range{r(3, 0, 1), r(1, n, 1), r(1, 0, n+1), r(0, 0, 0), {File: 1, First: 1, Count: ^uint32(0)}} {
		if checkMissing(m, []*slotv1.Range{bad}) == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}
