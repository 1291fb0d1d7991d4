package storaged

import (
	"fmt"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// model is a machine made of a State: it does steps as linux does, and keeps account of what is lost.
type model struct {
	State
	lost []string // what steps destroyed
}

func (m *model) disk(device string) *Disk {
	for i := range m.Disks {
		if m.Disks[i].Device == device {
			return &m.Disks[i]
		}
	}
	return nil
}

func (d *Disk) part(number int) *Partition {
	for i := range d.Partitions {
		if d.Partitions[i].Number == number {
			return &d.Partitions[i]
		}
	}
	return nil
}

// do does one step; an error means that the planner asked for what linux would refuse.
func (m *model) do(s Step) error {
	if s.Op == opEntry {
		seen := m.Entries[s.Volume]
		if seen == nil {
			return fmt.Errorf("%s is not mounted", s.Volume)
		}
		seen[s.Entry.path] = good
		return nil
	}
	d := m.disk(s.Disk)
	if d == nil {
		return fmt.Errorf("no disk %s", s.Disk)
	}
	switch s.Op {
	case opCreate:
		if d.Content.Data() {
			m.lost = append(m.lost, d.Content.String())
		}
		d.HasTable, d.Content, d.Partitions, d.Tail = true, probe.Result{Kind: probe.GPT}, nil, probe.Result{Kind: probe.Empty}
		d.TableError = ""
		return nil
	case opRepair:
		d.Repair = ""
		return nil
	case opAdd:
		if d.Tail.Data() {
			m.lost = append(m.lost, d.Tail.String())
		}
		d.Partitions = append(d.Partitions, Partition{Content: d.Tail, Partition: gpt.Partition{
			Number: s.Number, Name: string(s.Volume), Type: volumeNamed(s.Volume).typ, Attributes: unformatted,
			First: uint64(s.Start / 512), Last: uint64((s.Start+s.Size)/512) - 1,
		}})
		d.Tail = probe.Result{Kind: probe.Empty}
		return d.fits()
	}
	return m.doPartition(d, s)
}

func (m *model) doPartition(d *Disk, s Step) error {
	i := slices.IndexFunc(d.Partitions, func(p Partition) bool { return p.Number == s.Number })
	if i < 0 {
		return fmt.Errorf("no partition %d", s.Number)
	}
	p := &d.Partitions[i]
	if s.Op == opRemove {
		if p.Busy || !foreign(p.Partition) {
			return fmt.Errorf("%s is in use or ours", p.describe())
		}
		m.lost = append(m.lost, p.describe())
		d.Partitions = slices.Delete(slices.Clone(d.Partitions), i, i+1)
		return nil
	}
	v := volumeNamed(s.Volume)
	if !v.owns(p.Partition) {
		return fmt.Errorf("partition %d is not %s", s.Number, s.Volume)
	}
	switch s.Op {
	case opGrow:
		p.Last = uint64((s.Start+s.Size)/512) - 1
		return d.fits()
	case opTell:
		p.Device, p.Dev = s.Device, s.Device
		p.KernelStart, p.KernelSize = p.Start(), p.Size()
	case opMkfs:
		if p.Attributes&unformatted == 0 || p.Device == "" || p.KernelSize != p.Size() || p.Busy {
			return fmt.Errorf("%s must not be formatted", p.describe())
		}
		p.Content = probe.Result{Kind: probe.Ext4, Label: v.label, Size: p.Size() - 3*mib}
		p.Attributes &^= unformatted
	case opFsck:
		p.Content.Dirty = false
	case opMount:
		if p.Attributes&unformatted != 0 || p.Device == "" || p.Content.Kind != probe.Ext4 || p.Content.Label != v.label || p.Content.Dirty {
			return fmt.Errorf("%s must not be mounted", p.describe())
		}
		p.Busy = true
		m.Mounts = append(m.Mounts, Mount{Source: p.Device, Target: v.target, Dev: p.Dev})
		m.Entries[v.name] = map[string]found{}
	case opGrowFS:
		if !p.Busy {
			return fmt.Errorf("%s is not mounted", s.Volume)
		}
		p.Content.Size = p.KernelSize - 3*mib
	default:
		return fmt.Errorf("unknown step %v", s)
	}
	return nil
}

// boot forgets what a restart of the machine forgets; the kernel reads the tables anew.
func (m *model) boot() {
	m.Mounts, m.Entries = nil, map[VolumeName]map[string]found{}
	for i := range m.Disks {
		d := &m.Disks[i]
		for j := range d.Partitions {
			p := &d.Partitions[j]
			if d.HasTable {
				p.Device = node(d.Device, p.Number)
				p.Dev, p.KernelStart, p.KernelSize = p.Device, p.Start(), p.Size()
			}
			if !foreign(p.Partition) && p.Name != "ROOT-A" {
				p.Busy = false
			}
		}
	}
}

// clone copies everything that steps change.
func (m *model) clone() *model {
	c := &model{State: m.State, lost: slices.Clone(m.lost)}
	c.Disks = slices.Clone(m.Disks)
	for i := range c.Disks {
		c.Disks[i].Partitions = slices.Clone(c.Disks[i].Partitions)
	}
	c.Mounts = slices.Clone(m.Mounts)
	c.Entries = map[VolumeName]map[string]found{}
	for v, seen := range m.Entries {
		c.Entries[v] = map[string]found{}
		for k, f := range seen {
			c.Entries[v][k] = f
		}
	}
	return c
}
