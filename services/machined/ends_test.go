package machined

import (
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

// An ending is kept until the unit ends again; what a unit did in another boot was at no time of this one.
func TestEnding(t *testing.T) {
	at := time.Unix(1000, 0)
	e := ending{}.next(initctl.Status{Name: "x", Restarts: 1, LastExit: "exit 1", Since: at})
	if want := (ending{1, "exit 1", at}); e != want {
		t.Errorf("got %+v, want %+v", e, want)
	}
	if again := e.next(initctl.Status{Name: "x", Restarts: 1, LastExit: "exit 1", Since: at.Add(time.Second)}); again != e {
		t.Errorf("it is up again: got %+v, want %+v", again, e)
	}
	if boot := e.next(initctl.Status{Name: "x", Restarts: 0, Since: at.Add(time.Hour)}); boot != (ending{}) {
		t.Errorf("another boot: got %+v, want nothing", boot)
	}
}

// Who reached a memory limit is told with it.
func TestExitOf(t *testing.T) {
	d := &Daemon{cfg: Config{host: &modelHost{}}}
	for exit, want := range map[string]string{"exit 1": "exit 1", "killed by SIGKILL": "killed by SIGKILL", initctl.MemoryLimit: "killed by SIGKILL: it ran into its memory limit of 64 MiB"} {
		if got := d.exitOf("x", exit); got != want {
			t.Errorf("%q: got %q, want %q", exit, got, want)
		}
	}
}
