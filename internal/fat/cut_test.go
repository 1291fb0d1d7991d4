package fat

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/powercut"
)

// TestCuts cuts the power in every change of a directory, at every flush and among the writes between them. Afterwards every file that
// was not being made or removed is whole, the one that was is there whole, or not at all under its new name; and Reclaim leaves a file
// system in which fsck.vfat finds nothing.
func TestCuts(t *testing.T) {
	old, fresh := noise(1, 40_000), noise(2, 60_000)
	d := powercut.New(mkfs(t, 1, old))
	v := open(t, d)
	const temp, trial, good = "bulkhead.next", "bulkhead_0002_0.2.0+3.efi", "bulkhead_0002_0.2.0.efi"
	// bystander: a file in the same directory that must never change. mine may be there under any of these names.
	check := func(what, bystander string, bystanders []byte, mine []byte, may []string, gone bool) {
		t.Helper()
		random, reclaimed := rand.New(rand.NewPCG(1, 2)), 0
		n := d.Cuts(random, 3, func(m *powercut.Image) {
			w := open(t, m)
			for round := range 2 {
				if got := read(t, w, linux, bystander); !bytes.Equal(got, bystanders) {
					t.Fatalf("%s, round %d: %s changed", what, round, bystander)
				}
				if got := read(t, w, "EFI/BOOT", "BOOTX64.EFI"); !bytes.Equal(got, old) {
					t.Fatalf("%s, round %d: BOOTX64.EFI changed", what, round)
				}
				found := 0
				for _, name := range names(t, w) {
					switch {
					case slices.Contains(may, name):
						found++
						if got := read(t, w, linux, name); mine != nil && !bytes.Equal(got, mine) {
							t.Fatalf("%s, round %d: %s is there, not whole", what, round, name)
						}
					case name != bystander:
						t.Fatalf("%s, round %d: %s?", what, round, name)
					}
				}
				if found == 0 && !gone || found > 1 && round > 0 {
					t.Fatalf("%s, round %d: the file is there %d times: %v", what, round, found, names(t, w))
				}
				if round == 0 {
					must(t, w.Reclaim(func(a, b string) string { return max(a, b) }))
					w = open(t, m)
				}
			}
			if reclaimed++; reclaimed%7 == 0 {
				b := make([]byte, m.Size())
				if _, err := m.ReadAt(b, 0); err != nil {
					t.Fatal(err)
				}
				fsck(t, b)
			}
		})
		t.Logf("%s: %d cuts", what, n)
		d.Forget()
	}
	d.Forget()
	create(t, v, temp, fresh)
	check("create", oldName, old, nil, []string{temp}, true)
	must(t, v.Rename(linux, temp, trial))
	check("commit", oldName, old, fresh, []string{temp, trial}, false)
	must(t, v.Rename(linux, trial, good))
	check("mark good", oldName, old, fresh, []string{trial, good}, false)
	must(t, v.Rename(linux, oldName, "bulkhead_0003_0.1.0+3.efi"))
	check("rename mtools' file", good, fresh, old, []string{oldName, "bulkhead_0003_0.1.0+3.efi"}, false)
	must(t, v.Remove(linux, good))
	check("remove", "bulkhead_0003_0.1.0+3.efi", old, nil, []string{good}, true)
}

// A file that somebody else left in two sectors is renamed by two writes: a cut leaves both names, Reclaim one of them, and the file whole.
func TestCutInTwo(t *testing.T) {
	old := noise(1, 40_000)
	d := powercut.New(mkfs(t, 1, old))
	v := open(t, d)
	dir, err := v.walk(linux)
	must(t, err)
	must(t, v.grow(dir))
	e, _ := dir.find(oldName)
	slots := bytes.Clone(dir.data[e.from*slotSize : (e.to+1)*slotSize])
	for i := 2; i < perSector; i++ {
		dir.slot(i)[0] = slotDeleted
	}
	copy(dir.data[(perSector-1)*slotSize:], slots) // the first slot in one sector, the rest in the next
	must(t, v.writeDir(dir, 0))
	must(t, v.writeDir(dir, 1))
	must(t, v.tellFree())
	fsck(t, d.Content())
	d.Forget()
	const to = "bulkhead_0002_0.1.0+3.efi"
	must(t, v.Rename(linux, oldName, to))
	fsck(t, d.Content())
	both, n := 0, 0
	d.Cuts(rand.New(rand.NewPCG(3, 4)), 5, func(m *powercut.Image) {
		w := open(t, m)
		all := names(t, w)
		if len(all) == 2 {
			both++
			if err := w.Remove(linux, to); err == nil {
				t.Error("one of two names was removed with its clusters")
			}
		}
		must(t, w.Reclaim(func(a, b string) string { return max(a, b) }))
		w = open(t, m)
		if all = names(t, w); len(all) != 1 || !bytes.Equal(read(t, w, linux, all[0]), old) {
			t.Errorf("after Reclaim: %v", all)
		}
		if n++; n%4 != 0 && len(all) == 1 { // fsck takes its time
			return
		}
		b := make([]byte, m.Size())
		if _, err := m.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		fsck(t, b)
	})
	if both == 0 {
		t.Error("no cut left both names")
	}
}
