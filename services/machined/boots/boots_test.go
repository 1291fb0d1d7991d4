package boots

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const panicText = "[   10.100000] init: bulkhead: 11 modules loaded in 0.4 s\n[   11.000000] BUG: kernel NULL pointer dereference, address: 0000\n" +
	"[   11.000001] Oops: 0002 [#1] PREEMPT SMP\n[   11.200000] Kernel panic - not syncing: Fatal exception\n[   11.300000] Kernel Offset: disabled\n"

func TestSettle(t *testing.T) {
	ordered := Boot{Number: 7, ID: "a", Order: "reboot ordered by alice"}
	for _, c := range []struct {
		name   string
		boot   Boot
		found  Evidence
		end    End
		detail string // begins with
		later  End    // of a boot that never opened STATE; "" if there is none
	}{
		{"the power was cut", Boot{Number: 7}, Evidence{}, Unknown, "no trace", ""},
		{"it panicked", Boot{Number: 7}, Evidence{Panic: panicText}, Panic, "BUG: kernel NULL pointer dereference", ""},
		{"it hung", Boot{Number: 7}, Evidence{Watchdog: true}, Reset, "the hardware watchdog", ""},
		{"it panicked, and then the restart hung", Boot{Number: 7}, Evidence{Panic: panicText, Watchdog: true}, Panic, "BUG", ""},
		{"as ordered", ordered, Evidence{}, Clean, "reboot ordered by alice", ""},
		{"as ordered, and the next one hung", ordered, Evidence{Watchdog: true}, Clean, "reboot ordered by alice", Reset},
		{"as ordered, and the next one panicked", ordered, Evidence{Panic: panicText}, Clean, "reboot ordered by alice", Panic},
		{"the next one did not get to store itself", Boot{Number: 7, End: Panic, Detail: "x"}, Evidence{}, Panic, "x", ""},
		{"nor this time", Boot{Number: 7, End: Panic, Detail: "x"}, Evidence{Watchdog: true}, Panic, "x", Reset},
	} {
		got, later := settle(c.boot, c.found)
		if got.End != c.end || !strings.HasPrefix(got.Detail, c.detail) {
			t.Errorf("%s: %s, %s; want %s, %s", c.name, got.End, got.Detail, c.end, c.detail)
		}
		switch {
		case later == nil && c.later != "":
			t.Errorf("%s: no later boot, want %s", c.name, c.later)
		case later != nil && (later.End != c.later || later.Number != 8 || later.ID != "" || later.Detail == ""):
			t.Errorf("%s: later boot %+v, want %q", c.name, later, c.later)
		}
	}
}

func TestReason(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{panicText, "BUG: kernel NULL pointer dereference, address: 0000; Fatal exception"},
		{"[ 3.0] Kernel panic - not syncing: VFS: Unable to mount root fs\n", "VFS: Unable to mount root fs"},
		{"[ 3.0] init: bulkhead: cannot mount the root: input/output error\n[ 3.0] init: bulkhead: look at the lines of the kernel above\n[13.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n",
			"PID 1 gave up: cannot mount the root: input/output error"},
		{"[ 3.0] init: bulkhead: cannot load modules: x\n[ 9.0] Kernel panic - not syncing: hung\n", "hung"},
		{"[ 9.0] Oops: general protection fault\n", "Oops: general protection fault"},
		{"[ 9.0] x\n", "the kernel left lines that do not say why"},
	} {
		if got := reason(c.text); got != c.want {
			t.Errorf("%q:\ngot  %s\nwant %s", c.text, got, c.want)
		}
	}
}

func TestAssemble(t *testing.T) {
	early, late := time.Unix(100, 0), time.Unix(200, 0)
	for _, c := range []struct {
		name string
		all  []Record
		want string
	}{
		{"nothing", nil, ""},
		{"memory", []Record{{"dmesg-ramoops-0", late, "Panic#1 Part1\n<6>[1.0] a\n<0>[2.0] b\n"}}, "[1.0] a\n[2.0] b\n"},
		{"the firmware's parts, newest first", []Record{{"dmesg-efi-1", late, "Panic#1 Part1\n<4>[3.0] c\n"}, {"dmesg-efi-3", late, "Panic#1 Part3\n<4>[1.0] a\n"}, {"dmesg-efi-2", late, "Panic#1 Part2\n<4>[2.0] b\n"}},
			"[1.0] a\n[2.0] b\n[3.0] c\n"},
		{"an oops before the panic", []Record{{"dmesg-efi-2", late, "Panic#2 Part1\n[2.0] panic\n"}, {"dmesg-efi-1", late, "Oops#1 Part1\n[1.0] oops\n"}}, "[1.0] oops\n[2.0] panic\n"},
		{"of two boots", []Record{{"dmesg-efi-2", late, "Panic#1 Part1\n[2.0] new\n"}, {"dmesg-efi-1", early, "Panic#1 Part1\n[9.0] old\n"}}, "[9.0] old\n[2.0] new\n"},
		{"no head, no newline, bad text", []Record{{"dmesg-x-1", late, "\xff half"}}, "? half\n"},
		{"not unpacked", []Record{{"dmesg-efi-1.enc.z", late, "\x78\x9c"}}, ""},
	} {
		if got := assemble(c.all); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
	long := assemble([]Record{{"dmesg-x-1", late, strings.Repeat("[1.0] the same again and again\n", 5000) + "the end\n"}})
	if len(long) > maxPanic || !strings.HasPrefix(long, "[1.0]") || !strings.HasSuffix(long, "the end\n") {
		t.Errorf("%d bytes, from %.20q", len(long), long)
	}
}

func TestReadPanic(t *testing.T) {
	dir := t.TempDir()
	if text, names, err := ReadPanic(filepath.Join(dir, "none")); text != "" || names != nil || err != nil {
		t.Errorf("of no folder: %q, %q, %v", text, names, err)
	}
	for name, text := range map[string]string{"dmesg-ramoops-0": "Panic#1 Part1\n[1.0] a\n", "console-ramoops-0": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if text, names, err := ReadPanic(dir); text != "[1.0] a\n" || fmt.Sprint(names) != "[dmesg-ramoops-0]" || err != nil {
		t.Errorf("got %q, %q, %v", text, names, err)
	}
}

// boot is one boot of a node, with its machined.
func boot(t *testing.T, dir, id string, e Evidence) (*History, *Journal) {
	t.Helper()
	j := &Journal{}
	h, _, err := Open(dir, Boot{ID: id, Version: "v-" + id, Started: time.Unix(1000, 0).UTC()}, e, j)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return h, j
}

// texts are a boot's lines, each as "source: text".
func texts(t *testing.T, h *History, n int64, source string, tail uint32) string {
	t.Helper()
	b, err := h.Find(n)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := h.Lines(b, source, tail)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, l := range lines {
		all = append(all, l.Source+": "+l.Text)
	}
	return strings.Join(all, ", ")
}

// TestHistory is a node's life: what was said before STATE was open, a restart of machined, a power cut, a panic, an ordered reboot and
// a boot after it that never opened STATE.
func TestHistory(t *testing.T) {
	dir := t.TempDir()
	at := time.Unix(2000, 0)
	j := &Journal{}
	j.Add(at, "apid", "early")
	if err := j.Flush(); err != nil {
		t.Fatal(err)
	}
	h, since, err := Open(dir, Boot{ID: "a", Version: "v1"}, Evidence{}, j)
	if err != nil || !since.IsZero() {
		t.Fatal(since, err)
	}
	j.Add(at.Add(time.Second), "kernel", "tabs\tand\nlines")
	if err := j.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := texts(t, h, 0, "", 0); got != "apid: early, kernel: tabs\tand lines" {
		t.Errorf("got %s", got)
	}
	// machined is killed and started again.
	j2 := &Journal{}
	h, since, err = Open(dir, Boot{ID: "a", Version: "v1"}, Evidence{}, j2)
	if err != nil || !since.Equal(at.Add(time.Second)) || len(h.List()) != 1 {
		t.Fatalf("again: %v, %v, %v", since, h.List(), err)
	}
	j2.Add(at.Add(2*time.Second), "apid", "more")
	if err := j2.Close(); err != nil {
		t.Fatal(err)
	}

	boot(t, dir, "b", Evidence{})                            // the power was cut
	h, _ = boot(t, dir, "c", Evidence{Panic: panicText})     // b panicked
	if err := h.Order("reboot ordered by bob"); err != nil { // and c was ordered to end
		t.Fatal(err)
	}
	h, _ = boot(t, dir, "d", Evidence{Watchdog: true})
	var got []string
	for _, b := range h.List() {
		got = append(got, fmt.Sprintf("%d %s %s", b.Number, b.ID, b.End))
	}
	if text := strings.Join(got, ", "); text != "5 d , 4  reset, 3 c clean, 2 b panic, 1 a unknown" {
		t.Errorf("got %s", text)
	}
	if got := texts(t, h, 1, "", 2); got != "kernel: tabs\tand lines, apid: more" {
		t.Errorf("tail: %s", got)
	}
	if got := texts(t, h, -4, "apid", 0); got != "apid: early, apid: more" {
		t.Errorf("one unit: %s", got)
	}
	if got := texts(t, h, -3, "panic", 1); !strings.Contains(got, "Kernel Offset") {
		t.Errorf("panic: %s", got)
	}
	if b, _ := h.Find(1); !b.Seen.Equal(at.Add(2 * time.Second)) {
		t.Errorf("boot 1 was seen last at %s", b.Seen)
	}
	for _, n := range []int64{6, -5, -1 << 63, 1<<63 - 1} {
		if _, err := h.Find(n); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("boot %d: %v", n, err)
		}
	}
}

// TestFirstBootPanics: what a new node's first boots left is not lost, though none of them had a STATE.
func TestFirstBootPanics(t *testing.T) {
	h, _ := boot(t, t.TempDir(), "a", Evidence{Panic: panicText})
	if len(h.List()) != 2 || texts(t, h, -1, "panic", 1) == "" || h.List()[0].Number != 2 {
		t.Errorf("%+v", h.List())
	}
}

// TestBounds: neither many boots nor one that says much take more than their share, and damage is passed over.
func TestBounds(t *testing.T) {
	dir := t.TempDir()
	for i := range Keep + 5 {
		boot(t, dir, fmt.Sprint(i), Evidence{Panic: panicText})
	}
	for name, text := range map[string]string{"00000019.boot": "{", "00000007.log": "old", "x": "", "new.tmp": "half"} {
		if err := os.WriteFile(filepath.Join(dir, folder, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h, j := boot(t, dir, "last", Evidence{})
	if all := h.List(); len(all) != Keep || all[0].Number != Keep+7 || all[len(all)-1].Number != 7 {
		t.Errorf("%d boots, %d to %d", len(all), all[len(all)-1].Number, all[0].Number)
	}
	entries, err := os.ReadDir(filepath.Join(dir, folder))
	if err != nil || len(entries) > 3*Keep {
		t.Errorf("%d files, %v", len(entries), err)
	}
	start := time.Unix(5000, 0)
	for i := range 4000 { // over many windows
		j.Add(start.Add(time.Duration(i)*100*time.Millisecond), "loud", strings.Repeat("x", 5000))
		if i%100 == 0 {
			j.Add(start.Add(time.Duration(i)*100*time.Millisecond), "quiet", fmt.Sprint("word ", i))
		}
		if i%50 == 0 {
			if err := j.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	size := int64(0)
	for _, suffix := range []string{logSuffix, olderSuffix} {
		info, err := os.Stat(h.path(h.running().Number, suffix))
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > 2*segment+4*maxText {
		t.Errorf("the log has %d bytes", size)
	}
	all := texts(t, h, 0, "", 0)
	if !strings.Contains(all, "quiet: word 3900") || !strings.Contains(all, "lines left out]") {
		t.Errorf("the quiet one was not heard: %.200s … %s", all, all[len(all)-100:])
	}
}

// TestHeld: what is said while there is no STATE takes a bounded memory, and the newest of it stays.
func TestHeld(t *testing.T) {
	j := &Journal{}
	for i := range 5000 {
		j.Add(time.Unix(int64(i), 0), fmt.Sprint("unit", i%7), strings.Repeat("y", 100)+fmt.Sprint(" ", i))
	}
	if j.size > maxHeld || len(j.held) > maxHeld/lineWeight {
		t.Errorf("%d bytes are held in %d lines", j.size, len(j.held))
	}
	h, _, err := Open(t.TempDir(), Boot{ID: "a"}, Evidence{}, j)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Flush(); err != nil {
		t.Fatal(err)
	}
	if got := texts(t, h, 0, "", 0); !strings.HasSuffix(got, " 4999") || !strings.HasPrefix(got, "machined: [") || j.size != 0 {
		t.Errorf("got %.100s …", got)
	}
}

func TestNotable(t *testing.T) {
	for _, c := range []struct {
		level int
		text  string
		want  bool
	}{{7, "init: bulkhead: x", true}, {3, "disk", true}, {4, "y", true}, {0, "z", true}, {6, "usb 1-1: new", false}, {7, "initcall", false}} {
		if Notable(c.level, c.text) != c.want {
			t.Errorf("%d %q: %v", c.level, c.text, !c.want)
		}
	}
}

// TestNoFolder: what cannot be written is an error, not a history of nothing.
func TestNoFolder(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, folder), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(dir, Boot{ID: "a"}, Evidence{}, &Journal{}); err == nil {
		t.Error("no error")
	}
}
