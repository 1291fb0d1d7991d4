package updated

import (
	"fmt"
	"slices"
	"strings"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/config"
)

// State is what one look found. It is data only: plan needs nothing else.
type State struct {
	// Slots is storaged's word; nil if this machine has no boot loader that could start another version, and then NoSlots says why.
	Slots   *slotv1.GetResponse
	NoSlots string
	// Checks are the node's health; nil unless a version is on trial. Unhealthy is why they could not be had.
	Checks    []*machinev1.Check
	Unhealthy string
	Uptime    time.Duration // since the kernel was started
	looked    time.Duration // Uptime when the slots were asked for
	// Late says that an earlier try of the version has had all its time, in vain.
	Late bool
}

// running returns the slot of the running version; nil if there is none.
func (s State) running() *slotv1.Slot {
	for _, v := range s.Slots.GetSlots() {
		if v.GetRunning() {
			return v
		}
	}
	return nil
}

// onTrial reports whether the running version still has to prove itself.
func (s State) onTrial() bool { return s.running().GetStatus() == "on trial" }

// Op is what a step does.
type Op string

// The steps there are.
const (
	opProve   Op = "prove"     // somebody else's part: it cannot be done, only waited for
	opGood    Op = "mark good" // the trial ends
	opRaise   Op = "raise epoch"
	opRestart Op = "restart" // the next try, or the old version
)

// A Step is one change.
type Step struct {
	Op   Op
	What string // the proof, the version, or why
}

// String is the form for people.
func (s Step) String() string { return string(s.Op) + " " + s.What }

// A proof is one thing that a version has to prove.
type proof struct {
	name   config.Proof
	ok     bool
	detail string // what is missing
}

// prove judges a node's health. Equal inputs give equal proofs. A check that is not there is not passed: that is how a version looks whose
// machined does not know of etcd.
func prove(want []config.Proof, s State) []proof {
	var out []proof
	for _, name := range want {
		p := proof{name: name}
		switch {
		case s.Checks == nil:
			p.detail = or(s.Unhealthy, "the node's health is not known yet")
		default:
			p.ok, p.detail = judge(name, s.Checks)
		}
		out = append(out, p)
	}
	return out
}

// belongs says which proof a check counts for; "" if for none. updated's own does not: a version on trial has not converged here. Neither do
// conditions, like a volume that is nearly full: another version would not change them.
func belongs(check string) config.Proof {
	switch {
	case check == "api.answered":
		return config.ProofAPI
	case check == "etcd.converged":
		return config.ProofEtcd
	case check == "kubernetes.converged":
		return config.ProofKubelet
	case check == "updated.converged":
		return ""
	case strings.HasSuffix(check, ".up"), check == "init.answers":
		return config.ProofServices
	case strings.HasSuffix(check, ".converged"), check == "config.applied":
		return config.ProofConfig
	}
	return ""
}

func judge(name config.Proof, checks []*machinev1.Check) (ok bool, detail string) {
	found, missing := false, 0
	for _, c := range checks {
		if belongs(c.GetName()) != name {
			continue
		}
		if found = true; c.GetOk() {
			continue
		}
		if missing++; missing == 1 {
			detail = c.GetName() + ": " + or(c.GetDetail(), "no")
		}
	}
	switch {
	case !found:
		return false, "the node does not report it"
	case missing > 1:
		detail += fmt.Sprintf(" (and %d more)", missing-1)
	}
	return missing == 0, detail
}

func or(s, standard string) string {
	if s == "" {
		return standard
	}
	return s
}

// plan returns the steps of a version on trial: what it still has to prove; that it is good, once it has; and a restart when its time is
// over. Good is never decided by time, only that a try has failed is.
func plan(want config.Update, s State) ([]Step, error) {
	return within(patience(want, s), want.Health, s), nil
}

// within is plan with the time that a version on trial has.
func within(patience time.Duration, health []config.Proof, s State) []Step {
	r := s.running()
	if r == nil {
		return nil
	}
	if !s.onTrial() {
		if r.GetStatus() == "good" && s.Slots.GetEpochKept() && r.GetEpoch() > s.Slots.GetEpochFloor() {
			return []Step{{opRaise, fmt.Sprint(r.GetEpoch())}}
		}
		return nil
	}
	var steps []Step
	for _, p := range prove(health, s) {
		if !p.ok {
			steps = append(steps, Step{opProve, string(p.name) + ": " + p.detail})
		}
	}
	if len(steps) == 0 {
		return []Step{{opGood, r.GetVersion()}}
	}
	if s.Uptime >= patience {
		steps = append(steps, Step{opRestart, fmt.Sprintf("%s did not prove its health in %s; missing: %s", r.GetVersion(), patience, missing(steps))})
	}
	return steps
}

// retryPatience bounds what a version on trial has when an earlier try had all its time: the tries after that are for what may have been wrong around it, not for a
// version that is slow, and a node that does not do its job must not wait three times as long as somebody was ready to.
const retryPatience = 2 * time.Minute

// lockedPatience is what a version on trial has whose STATE stays locked though it has a key that opens it without a person. The version before
// has opened it, and what opens a disk does so in the first seconds: so this one will not. A key service may be late by a minute.
const lockedPatience = 90 * time.Second

// unlocksCheck is storaged's condition that STATE opens without a person. A STATE that only people can open does not have it.
const unlocksCheck = "storaged.STATE.unlocks"

// planBare is plan before the node's configuration is known: a version whose disk does not open must be left too.
func planBare(s State) ([]Step, error) {
	want := *config.Defaults().Update
	return within(barePatience(want, s), want.Health, s), nil
}

func barePatience(want config.Update, s State) time.Duration {
	for _, c := range s.Checks {
		if c.GetName() == unlocksCheck && !c.GetOk() {
			return lockedPatience
		}
	}
	return patience(want, s)
}

// patience is how long after its start a version on trial must have proved itself in this try.
func patience(u config.Update, s State) time.Duration {
	all := time.Duration(u.Patience) * time.Minute
	if s.Late {
		return min(all, retryPatience)
	}
	return all
}

// missing joins what is to be proved: etcd first, for without it the API server, and with it the kubelet, prove nothing.
func missing(steps []Step) string {
	var all []string
	for _, s := range steps {
		if s.Op == opProve {
			all = append(all, s.What)
		}
	}
	slices.SortStableFunc(all, func(a, b string) int {
		switch first := string(config.ProofEtcd) + ":"; {
		case strings.HasPrefix(a, first):
			return -1
		case strings.HasPrefix(b, first):
			return 1
		}
		return 0
	})
	return strings.Join(all, "; ")
}
