package machined

import (
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

// An end is by the memory limit if the kernel has killed for it since the end before, and by nothing else.
func TestEnding(t *testing.T) {
	at := time.Unix(1000, 0)
	e := ending{}
	for i, c := range []struct {
		restarts uint32
		exit     string
		kills    uint64
		want     string
	}{
		{0, "", 0, ""},
		{1, killed, 0, killed},
		{2, killed, 1, killed + ": it ran into its memory limit of 64 MiB"},
		{2, killed, 1, killed + ": it ran into its memory limit of 64 MiB"}, // up again
		{3, killed, 1, killed},
		{4, "exit 1", 2, "exit 1"}, // a child of its was killed
		{5, killed, 2, killed},
		{6, killed, 1, killed + ": it ran into its memory limit of 64 MiB"}, // its group was made anew
		{6, killed, 2, killed + ": it ran into its memory limit of 64 MiB"}, // PID 1 has not told of the next end yet
		{7, killed, 2, killed + ": it ran into its memory limit of 64 MiB"},
		{8, killed, 2, killed},
	} {
		u := initctl.Status{Name: "x", Restarts: c.restarts, LastExit: c.exit, Since: at.Add(time.Duration(i) * time.Second)}
		e = e.next(u, c.kills, 64<<20)
		if got := e.told(u.LastExit); got != c.want {
			t.Errorf("%d: %q, want %q", i, got, c.want)
		}
	}
	if e.At != at.Add(10*time.Second) || e.Exit != killed {
		t.Errorf("the last end is %+v", e)
	}
}
