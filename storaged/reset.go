package storaged

import (
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// planReset returns the steps that destroy the volumes which are marked for it, and take them off their disk. It needs no spec: what was begun
// before the power failed is finished before anything else happens.
//
// VAR comes first: as long as STATE is there, a cut in the middle destroys no more than was meant. That a volume is destroyed is seen on the
// disk, by its first bytes, and in what this process has done: each start does it once more, for a disk forgets nothing that is in use. One that is still in use stays in the table, marked: its file system may write a last block when the machine goes
// down, and the next start makes sure.
func planReset(have State) []Step {
	var steps []Step
	for _, d := range have.Disks {
		marked := d.doomed()
		if len(marked) == 0 || d.ReadOnly {
			continue
		}
		p, free := planner{have: have, disk: d}, true
		for _, q := range marked {
			v := volumes[volumeOf(q.Partition)]
			if q.Device == "" {
				p.add(p.step(opTell, v, q))
			}
			if q.Content.Kind == probe.Empty && have.Wiped[v.name] != "" {
				free = free && !q.Busy
				continue
			}
			p.add(p.step(opLeave, v, q))
			p.add(p.step(opDestroy, v, q))
			free = false // seen when it is so
		}
		if free {
			p.add(Step{Op: opDrop, Disk: d.Device})
		}
		steps = append(steps, p.steps...)
	}
	return steps
}

// doomed returns the volumes of a disk that are marked to be destroyed, the last one first.
func (d Disk) doomed() (out []Partition) {
	if !d.HasTable {
		return nil
	}
	for _, p := range d.Partitions {
		if volumeOf(p.Partition) >= 0 && isDoomed(p.Partition) {
			out = append(out, p)
		}
	}
	slices.SortStableFunc(out, func(a, b Partition) int { return volumeOf(b.Partition) - volumeOf(a.Partition) })
	return out
}

// doom marks all volumes of a table to be destroyed. They are unformatted, too: an older image opens none of them.
// This one write of the table is the moment of a reset: before it the node starts as it was, after it the next start destroys what is left.
func doom(t *gpt.Table) {
	for i, p := range t.Partitions {
		if volumeOf(p) >= 0 {
			t.Partitions[i].Attributes |= doomed | unformatted
		}
	}
}

// drop takes the volumes that are marked out of a table, and returns their numbers.
func drop(t *gpt.Table) (numbers []int) {
	t.Partitions = slices.DeleteFunc(slices.Clone(t.Partitions), func(p gpt.Partition) bool {
		gone := volumeOf(p) >= 0 && isDoomed(p)
		if gone {
			numbers = append(numbers, p.Number)
		}
		return gone
	})
	return numbers
}
