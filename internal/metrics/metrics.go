// Package metrics holds a daemon's figures until machined asks for them (control.v1 ReadMetrics).
//
// Daemons do not carry Prometheus' library: the gateway turns these into its form, once for all.
// Names are constants of the form bulkhead_<daemon>_<what>_<unit>; labels come from configuration, never from the network.
package metrics

import (
	"runtime/metrics"
	"sort"
	"strings"
	"sync"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
)

// Set is all figures of one daemon. The zero value is not usable; see New. It is safe for concurrent use.
type Set struct {
	daemon string
	mu     sync.Mutex
	vecs   []*Vec // guarded by mu
}

// New returns a set that has the Go runtime's figures already.
func New(daemon string) *Set { return &Set{daemon: daemon} }

// Vec is one metric with a sample for each combination of label values.
type Vec struct {
	set    *Set
	family *controlv1.Family // only name, help and type; set by add
	labels []string
	values map[string]float64 // guarded by set.mu; key: label values joined by NUL
}

func (s *Set) add(t controlv1.Family_Type, name, help string, labels []string) *Vec {
	v := &Vec{set: s, family: &controlv1.Family{Name: name, Help: help, Type: t}, labels: labels, values: map[string]float64{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vecs = append(s.vecs, v)
	return v
}

// Gauge adds a figure that goes up and down.
func (s *Set) Gauge(name, help string, labels ...string) *Vec {
	return s.add(controlv1.Family_GAUGE, name, help, labels)
}

// Counter adds a figure that only grows; its name ends in _total.
func (s *Set) Counter(name, help string, labels ...string) *Vec {
	return s.add(controlv1.Family_COUNTER, name, help, labels)
}

// Set gives the sample with these label values, in the order of the labels, a value.
func (v *Vec) Set(value float64, labelValues ...string) {
	v.set.mu.Lock()
	defer v.set.mu.Unlock()
	v.values[v.key(labelValues)] = value
}

// Add adds to the sample with these label values.
func (v *Vec) Add(delta float64, labelValues ...string) {
	v.set.mu.Lock()
	defer v.set.mu.Unlock()
	v.values[v.key(labelValues)] += delta
}

// Reset forgets all samples, before a whole new set of label values is given.
func (v *Vec) Reset() {
	v.set.mu.Lock()
	defer v.set.mu.Unlock()
	clear(v.values)
}

func (v *Vec) key(values []string) string {
	if len(values) != len(v.labels) {
		panic("metrics: " + v.family.Name + ": wrong number of label values")
	}
	return strings.Join(values, "\x00")
}

// Families returns all figures, samples sorted. The result is the caller's.
func (s *Set) Families() []*controlv1.Family {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.runtime()
	for _, v := range s.vecs {
		f := &controlv1.Family{Name: v.family.Name, Help: v.family.Help, Type: v.family.Type}
		keys := make([]string, 0, len(v.values))
		for k := range v.values {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			sample := &controlv1.Sample{Value: v.values[k]}
			if len(v.labels) > 0 {
				sample.Labels = map[string]string{}
				for i, value := range strings.Split(k, "\x00") {
					sample.Labels[v.labels[i]] = value
				}
			}
			f.Samples = append(f.Samples, sample)
		}
		out = append(out, f)
	}
	return out
}

// runtime returns what Go knows of this process; the same names for every daemon, told apart by the label that the gateway adds.
func (s *Set) runtime() []*controlv1.Family {
	read := []metrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(read)
	gauge := func(name, help string, v float64) *controlv1.Family {
		return &controlv1.Family{Name: name, Help: help, Type: controlv1.Family_GAUGE, Samples: []*controlv1.Sample{{Value: v}}}
	}
	return []*controlv1.Family{
		gauge("bulkhead_daemon_goroutines", "Goroutines of the daemon.", float64(read[0].Value.Uint64())),
		gauge("bulkhead_daemon_heap_bytes", "Live and not yet collected heap objects of the daemon.", float64(read[1].Value.Uint64())),
	}
}
