package machined

import (
	"cmp"
	"context"
	"fmt"
	"sort"
	"strings"
	"sync"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// report is one daemon's word on its spec.
type report struct {
	converged bool
	state     *controlv1.State
}

// area is what a daemon's convergence means to a person, where that is not the daemon's name.
var area = map[string]string{"kubeletd": "kubernetes", "etcdd": "etcd"}

// clockCheck is the check of the node's clock, and the condition under which daemons tell what they know of it.
const clockCheck = "clock"

// unconfigured is for a node that nobody has given a document.
const unconfigured = "the node has no configuration yet; apply one, an empty document will do"

// health decides whether the node does its job, and if not, why. open is what is wrong with its own protection, and clock with its
// clock; "" if nothing is.
func health(generation uint64, answered bool, units []initctl.Status, unitsErr error, reports map[string]report, open, clock string) *machinev1.GetHealthResponse {
	out := &machinev1.GetHealthResponse{Healthy: true}
	add := func(name string, ok bool, detail string) {
		out.Checks = append(out.Checks, &machinev1.Check{Name: name, Ok: ok, Detail: detail})
		out.Healthy = out.Healthy && ok
	}
	if generation == 0 {
		add("config.applied", false, unconfigured)
	} else {
		add("config.applied", true, fmt.Sprintf("generation %d", generation))
	}
	if answered {
		add("api.answered", true, "")
	} else {
		add("api.answered", false, "no call with credentials has come through apid since machined was started")
	}
	add("security", open == "", open)
	if unitsErr != nil {
		add("init.answers", false, unitsErr.Error())
	}
	for _, u := range units {
		_, needed := reports[u.Name]
		ok, detail := unitHealth(u, needed, time.Now())
		add(u.Name+".up", ok, detail)
	}
	for name, r := range reports {
		check := name
		if a := area[name]; a != "" {
			check = a
		}
		add(check+".converged", r.converged, remark(generation, r))
		for _, c := range r.state.GetConditions() {
			if c.GetName() == clockCheck { // one fact, whoever sees it
				clock = cmp.Or(clock, c.GetTrouble())
				continue
			}
			if c.GetExplains() || c.GetRemark() {
				continue
			}
			add(check+"."+c.GetName(), c.GetTrouble() == "", c.GetTrouble())
		}
	}
	add(clockCheck, clock == "", clock)
	sort.Slice(out.Checks, func(i, j int) bool { return out.Checks[i].Name < out.Checks[j].Name })
	return out
}

// A unit that was started so often without anybody's wish has to stay up for so long before it counts as up: one that crashes again and
// again is up at many a moment too, and a version of the system must not be found good at such a one.
const (
	restless = 3
	calm     = time.Minute
)

// unitHealth: a needed unit must be up; another may be down, which is then somebody's wish, unless it gave up by itself.
func unitHealth(u initctl.Status, needed bool, now time.Time) (ok bool, detail string) {
	switch {
	case u.State == "up" && u.Restarts >= restless && now.Sub(u.Since) < calm:
		return false, fmt.Sprintf("was started %d times since boot without anybody's wish, the last time %s ago; ended last with: %s", u.Restarts, now.Sub(u.Since).Round(time.Second), u.LastExit)
	case u.State == "up":
		return true, ""
	case u.State == "down" && !needed && u.LastExit != "exit 125":
		return true, "not started"
	}
	detail = u.State
	if u.LastExit != "" {
		detail += "; ended last with: " + u.LastExit
	}
	return false, detail
}

// remark says why a daemon has not converged.
func remark(generation uint64, r report) string {
	var parts []string
	if r.state.GetError() != "" {
		parts = append(parts, r.state.GetError())
	}
	if p := r.state.GetPending(); len(p) > 0 {
		more := ""
		if len(p) > 1 {
			more = fmt.Sprintf(" and %d more", len(p)-1)
		}
		parts = append(parts, "left to do: "+p[0]+more)
	}
	if len(parts) == 0 && !r.converged {
		switch have := r.state.GetGeneration(); {
		case generation == 0:
			parts = append(parts, "waits for a configuration")
		case have != generation:
			parts = append(parts, fmt.Sprintf("works towards generation %d, not yet %d", have, generation))
		default:
			parts = append(parts, "working")
		}
	}
	return strings.Join(parts, "; ")
}

// figures are machined's own metrics.
type figures struct {
	desired, observed, converged, daemonGeneration, daemonConverged, unitUp, unitRestarts, unitMemory, unitCPU, logDropped, auditDropped, auditRecords *metrics.Vec
}

func newFigures(s *metrics.Set) figures {
	return figures{
		desired:          s.Gauge("bulkhead_machined_generation_desired", "Generation of the configuration that is handed out; 0 if there is none."),
		observed:         s.Gauge("bulkhead_machined_generation_observed", "Lowest generation that a daemon works towards."),
		converged:        s.Gauge("bulkhead_machined_converged", "1 if every daemon has converged on the desired generation."),
		daemonGeneration: s.Gauge("bulkhead_machined_daemon_generation", "Generation that a daemon works towards.", "service"),
		daemonConverged:  s.Gauge("bulkhead_machined_daemon_converged", "1 if a daemon has converged on the desired generation.", "service"),
		unitUp:           s.Gauge("bulkhead_machined_unit_up", "1 if a unit is up.", "service"),
		unitRestarts:     s.Counter("bulkhead_machined_unit_restarts_total", "Starts of a unit since boot that nobody asked for.", "service"),
		unitMemory:       s.Gauge("bulkhead_machined_unit_memory_bytes", "Memory of a unit's control group.", "service"),
		unitCPU:          s.Counter("bulkhead_machined_unit_cpu_seconds_total", "Processor time of a unit's control group.", "service"),
		logDropped:       s.Counter("bulkhead_machined_log_dropped_lines_total", "Lines of a unit's log that could not be kept.", "service"),
		auditDropped:     s.Counter("bulkhead_machined_audit_dropped_total", "Calls that could not be kept for the audit log since machined was started."),
		auditRecords:     s.Gauge("bulkhead_machined_audit_sequence", "Number of the newest record of the audit log that is on the disk; 0 if there is none."),
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// update brings machined's own metrics up to date.
func (d *Daemon) update() {
	f := d.figures
	now, _ := d.running.Get()
	lowest, all := now.Number, now.Number != 0
	for _, h := range d.hands {
		converged, st := h.report(now.Number)
		lowest, all = min(lowest, st.GetGeneration()), all && converged
		f.daemonGeneration.Set(float64(st.GetGeneration()), h.daemon)
		f.daemonConverged.Set(truth(converged), h.daemon)
	}
	f.desired.Set(float64(now.Number))
	f.observed.Set(float64(lowest))
	f.converged.Set(truth(all))
	f.auditDropped.Set(float64(d.audit.Dropped()))
	f.auditRecords.Set(float64(d.audit.Head().Sequence))
	units, err := d.units()
	if err != nil {
		return // the old figures stand
	}
	for _, u := range units {
		memory, cpu := d.cfg.host.Usage(u.Name)
		f.unitUp.Set(truth(u.State == "up"), u.Name)
		f.unitRestarts.Set(float64(u.Restarts), u.Name)
		f.unitMemory.Set(float64(memory), u.Name)
		f.unitCPU.Set(cpu, u.Name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, l := range d.logs {
		f.logDropped.Set(float64(l.Dropped()), name)
	}
}

// readMetrics asks every daemon at once for its figures.
func (d *Daemon) readMetrics(ctx context.Context) []*machinev1.DaemonMetrics {
	out := make([]*machinev1.DaemonMetrics, len(d.hands)+1)
	var wait sync.WaitGroup
	for i, h := range d.hands {
		wait.Go(func() {
			out[i] = &machinev1.DaemonMetrics{Daemon: h.daemon}
			err := timed(ctx, metricsTime, func(ctx context.Context) (err error) {
				out[i].Families, err = h.link.Metrics(ctx)
				if err != nil && ctx.Err() != nil {
					err = fmt.Errorf("did not answer within %s", metricsTime)
				}
				return err
			})
			out[i].Error = errs.Text(err)
		})
	}
	d.update()
	out[len(d.hands)] = &machinev1.DaemonMetrics{Daemon: "machined", Families: d.cfg.Metrics.Families()}
	wait.Wait()
	sort.Slice(out, func(i, j int) bool { return out[i].GetDaemon() < out[j].GetDaemon() })
	return out
}
