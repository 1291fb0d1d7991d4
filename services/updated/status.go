package updated

import (
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// report is called by the loop after each round.
func (d *Daemon) report(s State) {
	d.state.Set(s)
	if s.running().GetStatus() == "good" {
		if err := os.WriteFile(d.cfg.GoodFile, nil, 0o600); err != nil {
			d.log.Warn("PID 1 not told", "err", err.Error())
		}
	}
	d.publish()
	_, desired := d.loop.Spec()
	d.meters.set(d.loop.State(), desired, s)
}

// publish makes the status that clients see.
func (d *Daemon) publish() {
	s, _ := d.state.Get()
	want, generation := d.loop.Spec()
	limit := patience(want, s)
	if generation == 0 {
		want = *config.Defaults().Update
		limit = barePatience(want, s)
	}
	p, _ := d.progress.Get()
	d.openBook() // what earlier boots have written is in the first status after STATE is there
	st := status(want, limit, s, d.loop.State(), d.book.get(), d.quit.Load(), time.Now())
	st.Upgrade = p
	if was, _ := d.status.Get(); !proto.Equal(was, st) {
		d.status.Set(st)
	}
}

// status puts into the API's words what is known. It is pure.
func status(want config.Update, limit time.Duration, s State, loop *controlv1.State, j journal, quit bool, now time.Time) *updatev1.Status {
	out := &updatev1.Status{Generation: loop.GetGeneration(), Converged: loop.GetConverged(), Pending: loop.GetPending(), Error: loop.GetError(),
		Epoch: s.Slots.GetEpoch(), EpochFloor: s.Slots.GetEpochFloor()}
	if s.NoSlots != "" {
		out.Error = s.NoSlots
	}
	if s.onTrial() && !quit {
		for _, p := range prove(want.Health, s) {
			out.Proofs = append(out.Proofs, &updatev1.Proof{Name: string(p.name), Ok: p.ok, Detail: p.detail})
		}
		// To the second: it is the same in every status.
		out.Deadline = timestamppb.New(now.Add(limit - s.Uptime).Round(10 * time.Second))
	}
	for _, v := range s.Slots.GetSlots() {
		out.Slots = append(out.Slots, &updatev1.Slot{
			Name: v.GetName(), Version: v.GetVersion(), Status: v.GetStatus(), Running: v.GetRunning(), Next: v.GetNext(), TriesLeft: v.GetTriesLeft(),
			TriesDone: v.GetTriesDone(), Epoch: v.GetEpoch(), RootHash: v.GetRootHash(), Sequence: v.GetSequence(),
		})
		last := out.Slots[len(out.Slots)-1]
		last.Detail = detail(last, out.Proofs, j)
	}
	if f := j.Failure; f != nil {
		out.Failure = &updatev1.Failure{Version: f.Version, RootHash: f.Root, Reason: f.Reason, Tries: f.Tries, Lines: f.Lines, Time: timestamppb.New(f.Time)}
	}
	for _, e := range slices.Backward(j.History) {
		out.History = append(out.History, &updatev1.History{Time: timestamppb.New(e.Time), What: e.What, Version: e.Version, By: e.By, Detail: e.Detail})
	}
	return out
}

// conditions tell of a version that had to be left: the node is as well as it was before. It is pure.
func conditions(j journal) []*controlv1.Condition {
	c := &controlv1.Condition{Name: "fallback", Help: "bhctl get versions", Remark: true}
	if f := j.Failure; f != nil {
		c.Trouble = fmt.Sprintf("%s was left after %d tries: %s", f.Version, f.Tries, f.Reason)
	}
	return []*controlv1.Condition{c}
}

// detail is one sentence about a slot.
func detail(v *updatev1.Slot, proofs []*updatev1.Proof, j journal) string {
	switch v.GetStatus() {
	case "good":
		for _, e := range slices.Backward(j.History) {
			if e.What == "good" && e.Version == v.GetVersion() {
				return fmt.Sprintf("found good by %s at %s", e.By, e.Time.UTC().Format(time.DateTime))
			}
		}
		return "as installed"
	case "on trial":
		if !v.GetRunning() {
			return fmt.Sprintf("will be tried at the next boot, %d tries", v.GetTriesLeft())
		}
		missing := 0
		text := ""
		for _, p := range proofs {
			if !p.GetOk() {
				if missing++; missing == 1 {
					text = p.GetName() + ": " + p.GetDetail()
				}
			}
		}
		switch {
		case missing == 0:
			return fmt.Sprintf("try %d", v.GetTriesDone())
		case missing > 1:
			text += fmt.Sprintf(" (and %d more)", missing-1)
		}
		return fmt.Sprintf("try %d; missing: %s", v.GetTriesDone(), text)
	case "failed":
		if f := j.Failure; f != nil && f.Root == v.GetRootHash() {
			return f.Reason
		}
		return "its tries are used up"
	case "given up":
		return "by a rollback"
	}
	return ""
}

// meters are the figures for Prometheus.
type meters struct {
	desired, observed, converged *metrics.Vec
	trial, triesLeft, upgrades   *metrics.Vec
	fetched                      *metrics.Vec
}

func newMeters(s *metrics.Set) meters {
	return meters{
		desired:   s.Gauge("bulkhead_updated_generation_desired", "Generation of the configuration that was handed out last."),
		observed:  s.Gauge("bulkhead_updated_generation_observed", "Generation of the configuration in the last round."),
		converged: s.Gauge("bulkhead_updated_converged", "1 if the last round found nothing left to do."),
		trial:     s.Gauge("bulkhead_updated_trial", "1 if the running version still has to prove itself."),
		triesLeft: s.Gauge("bulkhead_updated_tries_left", "Tries that the running version has left; 0 if it was found good."),
		upgrades:  s.Counter("bulkhead_updated_upgrades_total", "Upgrades since the start of the process, by their outcome.", "result"),
		fetched:   s.Counter("bulkhead_updated_fetched_bytes_total", "Bytes of images that were fetched."),
	}
}

func (m meters) set(loop *controlv1.State, desired uint64, s State) {
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	m.desired.Set(float64(desired))
	m.observed.Set(float64(loop.GetGeneration()))
	m.converged.Set(truth(loop.GetConverged()))
	m.trial.Set(truth(s.onTrial()))
	m.triesLeft.Set(float64(s.running().GetTriesLeft()))
}
