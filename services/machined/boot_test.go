package machined

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/services/machined/boots"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
)

// bootTexts lists boots as "number end: detail".
func bootTexts(t *testing.T, d *Daemon) string {
	t.Helper()
	r, err := (&machineServer{d: d}).ListBoots(t.Context(), &machinev1.ListBootsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, b := range r.GetBoots() {
		all = append(all, strings.TrimSpace(fmt.Sprintf("%d %s %s", b.GetNumber(), b.GetEnd(), b.GetDetail())))
	}
	return strings.Join(all, "; ")
}

func bootLines(ctx context.Context, d *Daemon, boot int64, source string) (all []string, err error) {
	err = (&machineServer{d: d}).StreamBootLog(&machinev1.StreamBootLogRequest{Boot: boot, Source: source}, stream[machinev1.BootLogLine]{ctx: ctx, send: func(l *machinev1.BootLogLine) error {
		all = append(all, l.GetSource()+": "+l.GetText())
		return nil
	}})
	return all, err
}

// TestBoots is three boots of a node: one that is ordered to end, one that panics, and the one that tells of both.
func TestBoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		d, stop := n.start()
		if _, err := (&machineServer{d: d}).ListBoots(t.Context(), &machinev1.ListBootsRequest{}); !errs.Is(err, errs.Precondition) {
			t.Errorf("without STATE: %v", err)
		}
		if _, err := bootLines(t.Context(), d, 0, ""); !errs.Is(err, errs.Precondition) {
			t.Errorf("without STATE: %v", err)
		}
		n.host.mount()
		time.Sleep(5 * time.Second)
		if got := bootTexts(t, d); got != "1 RUNNING" {
			t.Errorf("got %s", got)
		}
		// What was said before STATE was there is in it: the events of the units that came up.
		if lines, err := bootLines(t.Context(), d, 0, "events"); err != nil || len(lines) < len(recipients) || !strings.Contains(lines[0], "service up, process 10") {
			t.Errorf("got %q, %v", lines, err)
		}
		if lines, err := bootLines(t.Context(), d, 0, "kernel"); err != nil || len(lines) == 0 || lines[0] != "kernel: init: bulkhead: hello" || strings.Contains(fmt.Sprint(lines), "of no interest") {
			t.Errorf("got %q, %v", lines, err)
		}
		stop() // machined alone is started again: the same boot
		d, stop = n.start()
		synctest.Wait()
		if got := bootTexts(t, d); got != "1 RUNNING" {
			t.Errorf("after a restart of machined: %s", got)
		}
		if _, err := (&machineServer{d: d}).Reboot(t.Context(), &machinev1.RebootRequest{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		stop()

		n.past.id = "boot-b"
		d, stop = n.start()
		synctest.Wait()
		if got := bootTexts(t, d); got != "2 RUNNING; 1 CLEAN reboot ordered by unknown" {
			t.Errorf("after a reboot: %s", got)
		}
		stop()

		n.past.id = "boot-c"
		n.past.found = boots.Evidence{Panic: "[9.0] Kernel panic - not syncing: out of luck\n"}
		d, stop = n.start()
		defer func() { stop() }()
		synctest.Wait()
		if got := bootTexts(t, d); got != "3 RUNNING; 2 PANIC out of luck; 1 CLEAN reboot ordered by unknown" {
			t.Errorf("after a panic: %s", got)
		}
		if found, _ := n.past.Evidence(); found.Panic != "" {
			t.Error("the record is stored and was not deleted")
		}
		if lines, err := bootLines(t.Context(), d, -1, "panic"); err != nil || len(lines) != 1 || !strings.Contains(lines[0], "out of luck") {
			t.Errorf("got %q, %v", lines, err)
		}
		if _, err := bootLines(t.Context(), d, 99, ""); !errs.Is(err, errs.NotFound) {
			t.Errorf("boot 99: %v", err)
		}
		if all := strings.Join(eventTexts(t, d), "\n"); !strings.Contains(all, "did not end as ordered: out of luck") {
			t.Errorf("no event tells of the panic:\n%s", all)
		}
	})
}

// TestSecurity: health takes note of what is the node's own doing, and of nothing else.
func TestSecurity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		if _, err := apply(d, ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := &machineServer{d: d}
		check := func(healthy bool, detail string) {
			t.Helper()
			h, err := s.GetHealth(t.Context(), &machinev1.GetHealthRequest{})
			if err != nil || h.GetHealthy() != healthy {
				t.Fatalf("healthy %v, %v", h.GetHealthy(), err)
			}
			for _, c := range h.GetChecks() {
				if c.GetName() == "security" && c.GetDetail() != detail {
					t.Errorf("security: %q, want %q", c.GetDetail(), detail)
				}
			}
		}
		d.answered.Store(true)
		check(true, "")
		good := n.hardening()
		become := func(f security.Facts) {
			n.cluster.mu.Lock()
			defer n.cluster.mu.Unlock()
			n.facts = f
		}
		bad := good
		bad.Lockdown = "[none] integrity confidentiality"
		become(bad)
		time.Sleep(protectionAge)
		check(false, "lockdown is none, wanted integrity")
		r, err := s.GetSecurity(t.Context(), &machinev1.GetSecurityRequest{})
		if err != nil || len(r.GetSettings()) < 50 || r.GetSettings()[0].GetName() != "lockdown" || r.GetSettings()[0].GetOk() || r.GetSettings()[1].GetActual() != "1" {
			t.Errorf("%v, %v", r, err)
		}
		become(good)
		check(true, "") // at once: only a good answer is kept
	})
}
