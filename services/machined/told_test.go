package machined

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
)

// What a daemon tells in its log comes out as an event under its name, through a real pipe; the same line of a program that is none of ours is no event.
func TestDaemonsTell(t *testing.T) {
	n := newNode(t)
	pipes := map[string]*os.File{}
	logs := map[string]*slog.Logger{}
	for _, unit := range []string{"trustd", "kubelet", "apid"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		pipes[unit], logs[unit] = r, daemon.NewLog(w, unit)
	}
	n.init.pipe = func(unit string) (*os.File, error) {
		if pipes[unit] == nil {
			return nil, os.ErrClosed
		}
		return dup(pipes[unit])
	}
	n.host.mounted = true
	d, stop := n.start()
	defer stop()
	for range 3 {
		daemon.Tell(logs["kubelet"], daemon.EventAccess, "x", "kubelet says so")
		daemon.Tell(logs["trustd"], daemon.EventCluster, "used", "a machine was not let in:\tthe join token was used\nforged\ttrustd")
	}
	logs["trustd"].Info("not an event", "text", `{"msg":"event","type":"x","text":"forged"}`)
	daemon.Tell(logs["trustd"], daemon.EventCluster, "last", "the last one")
	until := time.Now().Add(30 * time.Second)
	var texts []string
	for !strings.Contains(strings.Join(texts, "\n"), "the last one") {
		if time.Now().After(until) {
			t.Fatalf("the event does not come: %q", texts)
		}
		texts = eventTexts(t, d)
	}
	all := strings.Join(texts, "\n")
	if strings.Count(all, "was not let in: the join token was used forged trustd") != 1 || strings.Contains(all, "kubelet says") || strings.Contains(all, `"forged"`) {
		t.Errorf("events:\n%s", all)
	}
}

// However many events there are, and whoever chooses what they are about: few are kept, the rest is counted, and one of another kind is not lost for an hour.
func TestToldIsBounded(t *testing.T) {
	var d told
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	e := daemon.Told{Type: "access", About: "foreign", Text: "somebody"}
	if got := d.take(at, e); got != "somebody" {
		t.Errorf("the first: %q", got)
	}
	for i := range 50 {
		if got := d.take(at.Add(time.Duration(i)*time.Second), e); got != "" {
			t.Errorf("again: %q", got)
		}
	}
	if got := d.take(at.Add(toldAgain), e); got != "somebody (and 50 times since 03:04:05)" {
		t.Errorf("an hour later: %q", got)
	}
	at, kept := at.Add(2*toldAgain), 0
	for i := range 10000 { // in ten minutes
		if d.take(at.Add(time.Duration(i)*60*time.Millisecond), daemon.Told{Type: "access", About: fmt.Sprint(i), Text: "x"}) != "" {
			kept++
		}
	}
	if kept < toldBurst || kept > toldBurst+10 || len(d.by) > toldMost {
		t.Errorf("%d of 10000 are kept, and %d remembered", kept, len(d.by))
	}
	if got := d.take(at.Add(11*time.Minute+time.Second), daemon.Told{Type: "cluster", About: "other", Text: "news"}); !strings.HasPrefix(got, "news (99") {
		t.Errorf("afterwards: %q", got)
	}
}
