package machined

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
	"github.com/bulkhead-os/bulkhead/services/machined/why"
)

const (
	probeTime = 2 * time.Second // for a daemon to show that it is there
	wordLines = 200             // of a unit's log that are looked at for its last words
	wordBytes = 400             // of one line
	clockID   = "machined/clock"
)

// leans are units whose folders lie on a volume: a full one ends them, and they cannot say so any more.
var leans = map[string][]string{
	"etcdd":      {"storaged/VAR.room"},
	"containerd": {"storaged/VAR.room"},
	"kubelet":    {"storaged/VAR.room"},
	"trustd":     {"storaged/STATE.room"},
	"updated":    {"storaged/STATE.room"},
}

// fall is when a unit's trouble began.
type fall struct {
	mark why.Mark
	up   time.Time // since when it was up before
}

// next is the fall after a change of the unit. One that stays up for a while has got up: the next trouble is another one. seen: its state before is known.
func (f fall) next(u initctl.Status, seen bool) fall {
	switch u.State {
	case "up":
		f.up = u.Since
	case "waiting", "down":
		if f.mark.At.IsZero() || !f.up.IsZero() && u.Since.Sub(f.up) >= calm {
			f.mark = why.Mark{At: u.Since, OrEarlier: !seen && u.Restarts > 0}
		}
	}
	return f
}

// marked notes since when what a state tells is as it is.
func (s status) marked(st *controlv1.State, now time.Time) status {
	mark := why.Mark{At: now, OrEarlier: s.state == nil}
	old := s.since
	s.since = map[string]why.Mark{}
	for _, c := range st.GetConditions() {
		if c.GetTrouble() != "" {
			s.since[c.GetName()] = cmp.Or(old[c.GetName()], mark)
		}
	}
	if st.GetConverged() {
		s.behind = why.Mark{}
	} else {
		s.behind = cmp.Or(s.behind, mark)
	}
	return s
}

// Why asks everybody at once whether they are there, and puts together what is known.
func (s *machineServer) Why(ctx context.Context, _ *machinev1.WhyRequest) (*machinev1.WhyResponse, error) {
	if err := s.d.lookedUp(ctx); err != nil {
		return nil, err
	}
	s.d.witness(ctx)
	snapshot, err := s.d.snapshot(ctx, s.d.protection.trouble())
	if err != nil {
		return nil, err
	}
	now, _ := s.d.running.Get()
	out := whyResponse(why.Explain(snapshot))
	out.Time = timestamppb.Now()
	if now.Number != 0 {
		out.Node = now.set.Machine.Hostname
	}
	return out, nil
}

func whyResponse(a why.Answer) *machinev1.WhyResponse {
	out := &machinev1.WhyResponse{Healthy: len(a.Causes) == 0}
	for _, c := range a.Causes {
		m := &machinev1.Cause{Also: c.Also, Command: c.Steps[len(c.Steps)-1].Command}
		for _, s := range c.Steps {
			m.Steps = append(m.Steps, whyStep(s))
		}
		out.Causes = append(out.Causes, m)
	}
	for _, s := range a.Remarks {
		out.Remarks = append(out.Remarks, whyStep(s))
	}
	return out
}

func whyStep(s why.Step) *machinev1.WhyStep {
	m := &machinev1.WhyStep{Subject: s.Subject, OrEarlier: s.Since.OrEarlier, Text: s.Text, Command: s.Command, LastWords: s.Words}
	if !s.Since.At.IsZero() {
		m.Since = timestamppb.New(s.Since.At)
	}
	return m
}

// snapshot is all that is known now. open is what is wrong with the node's own protection.
func (d *Daemon) snapshot(ctx context.Context, open string) (why.Snapshot, error) {
	out := why.Snapshot{Security: open, Clock: d.clockTrouble()}
	now, _ := d.running.Get()
	if now.Number == 0 {
		out.Unconfigured = unconfigured
	}
	silent, figures, err := d.probe(ctx)
	if err != nil {
		return out, err
	}
	needed := map[string]bool{}
	for i, h := range d.hands {
		needed[h.daemon] = true
		converged, st := h.report(now.Number)
		s, _ := h.status.Get()
		e := why.Daemon{Name: h.daemon, Area: cmp.Or(area[h.daemon], h.daemon), Silent: silent[i], Silence: s.lost, Since: s.behind, Refused: s.refused != ""}
		if !converged {
			e.Behind = cmp.Or(remark(now.Number, report{converged, st}), "working")
			if p := st.GetPending(); s.refused == "" && len(p) > 0 {
				e.Left = remark(now.Number, report{converged, &controlv1.State{Pending: p}})
			}
		}
		for _, c := range st.GetConditions() {
			if c.GetName() == clockCheck { // one fact, whoever sees it
				out.Clock = cmp.Or(out.Clock, c.GetTrouble())
				continue
			}
			e.Conditions = append(e.Conditions, why.Condition{Name: c.GetName(), Trouble: c.GetTrouble(), Needs: c.GetNeeds(), Help: c.GetHelp(),
				Explains: c.GetExplains(), Remark: c.GetRemark(), Since: s.since[c.GetName()]})
		}
		if text := expired(figures[i], time.Now()); text != "" {
			e.Conditions = append(e.Conditions, why.Condition{Name: "certificate", Trouble: text, Needs: signing})
		}
		out.Daemons = append(out.Daemons, e)
	}
	units, err := d.units()
	out.Init = errs.Text(err)
	for _, u := range units {
		ok, detail := unitHealth(u, needed[u.Name], time.Now())
		if ok {
			d.mu.Lock()
			if text := d.endedLately(u, time.Now()); text != "" {
				out.Ended = append(out.Ended, why.Unit{Name: u.Name, Trouble: text, Since: why.Mark{At: d.ends[u.Name].At}})
			}
			d.mu.Unlock()
			continue
		}
		d.mu.Lock()
		mark := cmp.Or(d.falls[u.Name].mark, why.Mark{At: u.Since})
		d.mu.Unlock()
		out.Units = append(out.Units, why.Unit{Name: u.Name, Trouble: detail, Since: mark, Final: u.State == "down" && u.LastExit == "exit 125",
			Words: d.lastWords(ctx, u), Needs: leans[u.Name]})
	}
	return out, nil
}

// probe says of each daemon, in the order of hands, why it does not answer, "" if it does, and returns its figures. One that is frozen holds its connection open
// and says nothing: so it is asked for something. It fails if the caller did not leave it the time.
func (d *Daemon) probe(ctx context.Context) ([]string, [][]*controlv1.Family, error) {
	out, figures := make([]string, len(d.hands)), make([][]*controlv1.Family, len(d.hands))
	var wait sync.WaitGroup
	var hurried atomic.Bool
	start := time.Now()
	for i, h := range d.hands {
		if s, _ := h.status.Get(); !s.here {
			out[i] = "does not answer"
			continue
		}
		wait.Go(func() {
			err := timed(ctx, probeTime, func(ctx context.Context) error {
				f, err := h.link.Metrics(ctx)
				figures[i] = f
				return err
			})
			over := errors.Is(err, context.DeadlineExceeded) || grpcstatus.Code(err) == codes.DeadlineExceeded // whoever sees it first, even the other end
			switch {
			case over && time.Since(start) < probeTime: // the caller's time, not ours
				hurried.Store(true)
			case over:
				out[i] = fmt.Sprintf("its process runs, but has not answered for %s: it hangs", probeTime)
			case errs.Is(err, errs.Unavailable):
				out[i] = "does not answer: " + errs.Text(err)
			}
		})
	}
	wait.Wait()
	if ctx.Err() != nil || hurried.Load() {
		return nil, nil, errs.New(errs.Unavailable, "there was not enough time to ask every daemon: it takes %s", probeTime)
	}
	return out, figures, nil
}

// signing is what a certificate needs to be renewed.
var signing = []string{"trustd/answers", "trustd/converged", "trustd/keys", "trustd/certificate", clockID}

// expired names a daemon's certificate, or an authority's, that is over: both tell the time in their figures. Daemons renew theirs long before. It is pure.
func expired(families []*controlv1.Family, now time.Time) string {
	for _, f := range families {
		if !strings.HasSuffix(f.GetName(), "_certificate_expiry_timestamp_seconds") && !strings.HasSuffix(f.GetName(), "_authority_expiry_timestamp_seconds") {
			continue
		}
		for _, s := range f.GetSamples() {
			for _, label := range s.GetLabels() { // the profile, or the authority: there is one label
				if end := time.Unix(int64(s.GetValue()), 0); s.GetValue() > 0 && !end.After(now) {
					return fmt.Sprintf("the certificate %s has expired at %s, and was not renewed", label, end.UTC().Format(time.RFC3339))
				}
			}
		}
	}
	return ""
}

// lastWords are what a unit wrote before it ended last; nil if it wrote nothing or its log is not open.
func (d *Daemon) lastWords(ctx context.Context, u initctl.Status) []string {
	d.mu.Lock()
	l := d.logs[u.Name]
	d.mu.Unlock()
	if l == nil || u.LastExit == "" {
		return nil
	}
	var lines []string
	err := l.Stream(ctx, wordLines, false, func(l logs.Line) error {
		// What came after the newest start is another process's.
		if (u.State != "up" && u.State != "starting" || l.Time.Before(u.Since)) && strings.TrimSpace(l.Text) != "" {
			lines = append(lines, l.Text)
		}
		return nil
	})
	if err != nil { // the answer is worth as much without
		return nil
	}
	return telling(lines)
}

// telling picks the last line, and before it what a Go program says when it dies: a stack follows, which tells a person less. It is pure.
func telling(lines []string) []string {
	if len(lines) == 0 {
		return nil
	}
	for i := len(lines) - 1; i >= 0; i-- {
		if strings.HasPrefix(lines[i], "panic: ") || strings.HasPrefix(lines[i], "fatal error: ") {
			return []string{plain(lines[i])}
		}
	}
	return []string{plain(lines[len(lines)-1])}
}

// plain makes a line of our daemons' logs one for people, and bounds any line.
func plain(line string) string {
	var e map[string]any
	if json.Unmarshal([]byte(line), &e) == nil {
		if msg, ok := e["msg"].(string); ok {
			line = msg
			if text, ok := e["err"].(string); ok {
				line += ": " + text
			}
		}
	}
	line = strings.Map(func(r rune) rune { // it is read on a terminal
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, logs.Clean(line))
	return logs.Cut(line, wordBytes)
}
