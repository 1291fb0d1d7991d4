package slots

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/powercut"
)

// halves is how many random states are tried at each flush; BULKHEAD_CUTS makes it more for a long run.
func halves() int {
	if n, err := strconv.Atoi(os.Getenv("BULKHEAD_CUTS")); err == nil {
		return n
	}
	return 2
}

// TestPowerCuts cuts the power in upgrade, mark good, rollback and another upgrade: at every flush, in every write, at random halves of
// what was not flushed. Each time the machine must start one of the versions that may run then, whole and verified; and storaged must be
// able to go on.
func TestPowerCuts(t *testing.T) {
	one, two, three := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0"), makeVersion(t, "0.3.0")
	disk, d := install(t, one)
	total := 0
	// cuts cuts since the last time. before and after are the versions that may start; after the cut, then is done.
	cuts := func(what string, may ...version) {
		t.Helper()
		random := rand.New(rand.NewPCG(1, 2))
		running := disk.running
		n := d.Cuts(random, halves(), func(m *powercut.Image) {
			cut := &testDisk{m, running, map[PartName]int{}}
			v, err := cut.start(may...)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			s := newStore(cut, v.name)
			r, err := s.Get(t.Context())
			if err != nil {
				t.Fatalf("%s: %s runs, but: %v", what, v.name, err)
			}
			for _, slot := range r.Slots {
				if slot.Running && slot.Status != Good && slot.Status != Trial {
					t.Fatalf("%s: %s runs and is %s", what, v.name, slot.Status)
				}
			}
			if total++; total%97 == 0 { // it goes on from there, to the end
				must2(s.MarkGood(t.Context(), false))
				next := three
				if v.name == three.name {
					next = two
				}
				upgrade(t, s, next)
				if v, err := cut.start(one, two, three); err != nil || v.name != next.name {
					t.Fatalf("%s: after another upgrade: %s, %v", what, v.name, err)
				}
			}
		})
		t.Logf("%s: %d states", what, n)
		d.Forget()
	}
	s := newStore(disk, "0.1.0")
	upgrade(t, s, two)
	cuts("upgrade", one, two)
	if _, err := disk.start(one, two); err != nil {
		t.Fatal(err)
	}
	d.Forget()
	s = newStore(disk, "0.2.0")
	must2(s.MarkGood(t.Context(), false))
	cuts("mark good", two)
	if _, _, err := s.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	cuts("rollback", one, two)
	if v, err := disk.start(one, two); err != nil || v.name != "0.1.0" {
		t.Fatal(v.name, err)
	}
	d.Forget()
	s = newStore(disk, "0.1.0")
	must2(s.MarkGood(t.Context(), false))
	cuts("mark good after a rollback", one)
	upgrade(t, s, three)
	cuts("upgrade over an old version", one, three)
	if total < 200 {
		t.Errorf("only %d states", total)
	}
}

// TestFaults lets every write and flush of an upgrade fail once. The call says so, and the machine starts all the same.
func TestFaults(t *testing.T) {
	one, two := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0")
	broken := errors.New("the disk is broken")
	for n := 0; ; n++ {
		disk, d := install(t, one)
		s := newStore(disk, "0.1.0")
		count := 0
		d.Fail = func(string) error {
			if count++; count > 7*n {
				return broken
			}
			return nil
		}
		err := func() error {
			session, missing, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
			if err != nil {
				return err
			}
			for _, r := range missing {
				f := two.head.Manifest.Files[r.File]
				for j := r.First; j < r.First+r.Count; j++ {
					if err := s.WriteChunks(session, r.File, j, two.files[r.File][f.Start(j):f.Start(j+1)]); err != nil {
						return err
					}
				}
			}
			_, err = s.Commit(t.Context(), session, quiet)
			return err
		}()
		d.Fail = nil
		if err != nil && !errors.Is(err, broken) {
			t.Fatalf("fault at %d: %v", n, err)
		}
		v, e := disk.start(one, two)
		if e != nil {
			t.Fatalf("fault at %d: %v", n, e)
		}
		if err == nil {
			if v.name != "0.2.0" {
				t.Errorf("without a fault %s runs", v.name)
			}
			t.Logf("%d faults", n)
			return
		}
		if v.name != "0.1.0" && n < 3 {
			t.Error(fmt.Errorf("fault at %d: %s runs", n, v.name))
		}
	}
}
