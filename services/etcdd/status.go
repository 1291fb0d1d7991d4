package etcdd

import "github.com/bulkhead-os/bulkhead/internal/metrics"

// status is the daemon's figures.
type status struct {
	desired, observed, converged  *metrics.Vec
	running, leader, size, inUse  *metrics.Vec
	revision, term, index, alarms *metrics.Vec
	rolling, left                 *metrics.Vec
}

func newStatus(m *metrics.Set) status {
	return status{
		desired:   m.Gauge("bulkhead_etcdd_generation_desired", "Generation of the configuration that is worked towards."),
		observed:  m.Gauge("bulkhead_etcdd_generation_observed", "Generation of the configuration of the last round."),
		converged: m.Gauge("bulkhead_etcdd_converged", "1 if the last round left nothing to do."),
		running:   m.Gauge("bulkhead_etcdd_member_ready", "1 if the member runs and has a leader."),
		leader:    m.Gauge("bulkhead_etcdd_member_leader", "1 if this member leads."),
		size:      m.Gauge("bulkhead_etcdd_database_bytes", "Size of the database file."),
		inUse:     m.Gauge("bulkhead_etcdd_database_used_bytes", "Part of the database file that holds data."),
		revision:  m.Gauge("bulkhead_etcdd_revision", "Revision of the key space."),
		term:      m.Gauge("bulkhead_etcdd_raft_term", "Term of raft."),
		index:     m.Gauge("bulkhead_etcdd_raft_index", "Index of raft's log."),
		rolling:   m.Gauge("bulkhead_etcdd_rolling_change", "1 for the state of the last change of all nodes: running, halted, aborting, aborted or done. A halted one wants a person.", "state"),
		left:      m.Gauge("bulkhead_etcdd_rolling_nodes_left", "Nodes that the last change of all nodes has not done."),
		alarms:    m.Gauge("bulkhead_etcdd_errors", "Errors and alarms that the member reports."),
	}
}

// report is called after each round with what was read.
func (d *Daemon) report(s State) {
	_, generation := d.loop.Spec()
	st := d.loop.State()
	d.status.desired.Set(float64(generation))
	d.status.observed.Set(float64(st.GetGeneration()))
	d.status.converged.Set(number(st.GetConverged()))
	d.status.running.Set(number(s.Ready))
	d.status.leader.Set(number(s.Member.Leader))
	d.status.size.Set(float64(s.Member.DatabaseBytes))
	d.status.inUse.Set(float64(s.Member.DatabaseUsedByte))
	d.status.revision.Set(float64(s.Member.Revision))
	d.status.term.Set(float64(s.Member.Term))
	d.status.index.Set(float64(s.Member.Index))
	d.status.alarms.Set(float64(len(s.Member.Errors)))
}

// tellRolling notes where a rolling change is. Every control plane says the same.
func (s status) tellRolling(state string, left int) {
	s.rolling.Reset()
	if state != "" {
		s.rolling.Set(1, state)
	}
	s.left.Set(float64(left))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
