package storaged

import (
	"fmt"
	"maps"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
	"github.com/bulkhead-os/bulkhead/storaged/wipe"
)

// model is a machine made of a State: it does steps as linux does, and keeps account of what is lost.
type model struct {
	State
	lost   []string                    // what steps destroyed
	inside map[VolumeName]probe.Result // of encrypted volumes that are locked
	open   map[VolumeName]bool         // files of somebody's are open on the volume
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
	if s.Op == opCap {
		m.TPM.Capped = true
		return nil
	}
	if s.Op == opHold || s.Op == opRelease {
		m.Reset = s.Op == opHold
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
	case opLay, opRoot, opBoot, opDone:
		return m.doInstall(d, s)
	case opDoom, opDrop:
		return m.doTable(d, s)
	case opRemoveOS:
		d.HasTable, d.Content, d.Partitions = false, probe.Result{Kind: probe.Empty}, nil
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

// doTable marks volumes, or takes marked ones out.
func (m *model) doTable(d *Disk, s Step) error {
	t := d.table()
	if s.Op == opDoom {
		doom(&t)
		for i := range t.Partitions {
			d.Partitions[i].Attributes = t.Partitions[i].Attributes
		}
		return nil
	}
	gone := drop(&t)
	for _, p := range d.Partitions {
		if slices.Contains(gone, p.Number) && (p.Busy || p.Content.Kind != probe.Empty) {
			return fmt.Errorf("%s is taken off the disk, but not destroyed", p.describe())
		}
	}
	d.Partitions = slices.DeleteFunc(slices.Clone(d.Partitions), func(p Partition) bool { return slices.Contains(gone, p.Number) })
	return nil
}

// doReset leaves or destroys a volume.
func (m *model) doReset(p *Partition, s Step) error {
	if p.Attributes&doomed == 0 {
		return fmt.Errorf("%s is not marked", p.describe())
	}
	v := volumeNamed(s.Volume)
	if s.Op == opLeave {
		if m.open[s.Volume] {
			return nil
		}
		m.Mounts = slices.DeleteFunc(slices.Clone(m.Mounts), func(x Mount) bool { return x.Target == v.target && (x.Dev == p.Dev || x.Dev == p.Map.Dev) })
		p.Map, p.Busy = Map{}, false
		return nil
	}
	if m.Wiped == nil {
		m.Wiped = map[VolumeName]wipe.How{}
	}
	m.Wiped[s.Volume] = wipe.Kept
	p.Content, p.LUKS = probe.Result{Kind: probe.Empty}, vault.Header{}
	return nil
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
	case opLeave, opDestroy:
		return m.doReset(p, s)
	case opTell:
		p.Device, p.Dev = s.Device, s.Device
		p.KernelStart, p.KernelSize = p.Start(), p.Size()
	case opMkfs, opFsck, opMount, opGrowFS:
		if s.Encrypted && p.Map.Device == "" {
			return fmt.Errorf("%s is locked", s.Volume)
		}
		return m.doFS(p, s)
	default:
		return m.doLUKS(p, s)
	}
	return nil
}

// doFS changes a file system, on the partition or on the open device over it.
func (m *model) doFS(p *Partition, s Step) error {
	v := volumeNamed(s.Volume)
	at := Map{p.Device, p.Dev, p.KernelSize, p.Content}
	if s.Encrypted {
		at = p.Map
	}
	switch c := &at.Content; s.Op {
	case opMkfs:
		if p.Attributes&unformatted == 0 || at.Device == "" || p.KernelSize != p.Size() || p.Busy && !s.Encrypted {
			return fmt.Errorf("%s must not be formatted", p.describe())
		}
		*c = probe.Result{Kind: probe.Ext4, Label: v.label, Size: at.Size - 3*mib}
		p.Attributes &^= unformatted
	case opFsck:
		c.Dirty = false
	case opMount:
		if s.Encrypted {
			c.Dirty = false // linux looks once more
		}
		if p.Attributes&unformatted != 0 || at.Device == "" || c.Kind != probe.Ext4 || c.Label != v.label || c.Dirty {
			return fmt.Errorf("%s must not be mounted", p.describe())
		}
		if m.TPM.TPM && !m.TPM.Capped {
			return fmt.Errorf("%s is mounted while the TPM is not capped", s.Volume)
		}
		p.Busy = true
		m.Mounts = append(m.Mounts, Mount{Source: at.Device, Target: v.target, Dev: at.Dev})
		m.Entries[v.name] = map[string]found{}
	case opGrowFS:
		if !p.Busy {
			return fmt.Errorf("%s is not mounted", s.Volume)
		}
		c.Size = at.Size - 3*mib
	}
	if s.Encrypted {
		p.Map = at
	} else {
		p.Content = at.Content
	}
	if !p.encrypted() {
		p.LUKS = vault.Header{}
	}
	return nil
}

// doLUKS does what concerns encryption. What a locked volume holds is in m.inside.
func (m *model) doLUKS(p *Partition, s Step) error {
	open := func(content probe.Result) {
		p.Map = Map{"/dev/mapper/" + vault.MapName(string(s.Volume)), "dm:" + string(s.Volume), p.KernelSize - p.LUKS.Offset, content}
		p.Busy = true
	}
	switch s.Op {
	case opLUKS:
		if p.Attributes&unformatted == 0 || p.Device == "" || p.KernelSize != p.Size() || p.Busy {
			return fmt.Errorf("%s must not be formatted", p.describe())
		}
		p.Content, p.LUKS = probe.Result{Kind: probe.LUKS}, vault.Header{UUID: "u", Offset: 16 * mib}
		for i, k := range s.Keys {
			if _, ok := m.mounted("/state"); k == vault.State && !ok {
				return fmt.Errorf("STATE is not mounted")
			}
			p.LUKS.Keys = append(p.LUKS.Keys, vault.Key{Slot: i, Kind: k})
		}
		open(probe.Result{Kind: "unknown"})
	case opOpen:
		if p.Map.Device != "" || p.LUKS.Has(vault.TPM) && m.TPM.Capped && len(p.LUKS.Keys) == 2 {
			return fmt.Errorf("%s cannot be opened", s.Volume)
		}
		open(m.inside[s.Volume])
	case opClose:
		p.Map, p.Busy = Map{}, false
	case opHeader:
		p.LUKS.Repair = ""
	case opGrowMap:
		p.Map.Size = p.KernelSize - p.LUKS.Offset
	case opOwner:
		m.TPM.Owned = true
	case opKey:
		k := vault.Key{Slot: len(p.LUKS.Keys), Kind: s.Wish.Kind, Detail: "partition " + s.Wish.Partition}
		if s.Wish.Kind == vault.Service {
			k.Detail = s.Wish.Address
		}
		p.LUKS.Keys = append(slices.Clone(p.LUKS.Keys), k)
	default:
		return fmt.Errorf("unknown step %v", s)
	}
	return nil
}

// doInstall copies the system, which is not more than marks.
func (m *model) doInstall(d *Disk, s Step) error {
	whole, _ := d.laid()
	switch {
	case s.Op == opLay:
		m.Install.Began = true
		if whole {
			return nil
		}
		if len(d.Partitions) > 0 {
			return fmt.Errorf("%s has partitions", d)
		}
		if d.Tail.Data() {
			m.lost = append(m.lost, d.Tail.String())
		}
		for _, q := range layout.Partitions(func(string) gpt.GUID { return gpt.GUID{} }) {
			if q.Name == layout.ESP || q.Name == layout.RootA {
				q.Attributes |= unformatted
			}
			p := Partition{Partition: q, Device: node(d.Device, q.Number), KernelStart: q.Start(), KernelSize: q.Size()}
			p.Dev = p.Device
			d.Partitions = append(d.Partitions, p)
		}
		d.Tail = probe.Result{Kind: probe.Empty}
		return d.fits()
	case !whole || !d.installing():
		return fmt.Errorf("no installation was begun on %s", d)
	case s.Op == opDone && d.System:
		d.part(1).Attributes &^= unformatted
		return nil
	case d.System:
		return fmt.Errorf("%s is the system", d)
	}
	m.Install.Began = true
	if s.Op == opRoot {
		d.part(2).Attributes &^= unformatted
		return nil
	}
	if d.part(2).Attributes&unformatted != 0 {
		return fmt.Errorf("the root is not there yet")
	}
	if _, ok := m.mounted("/state"); !ok {
		return fmt.Errorf("%s becomes a system without a STATE", d)
	}
	d.part(1).Attributes &^= unformatted
	return nil
}

// boot forgets what a restart of the machine forgets; the kernel reads the tables anew.
func (m *model) boot() {
	m.Mounts, m.Entries = nil, map[VolumeName]map[string]found{}
	m.TPM.Capped, m.Reset, m.Wiped, m.open = false, false, nil, nil
	m.Install.Began = false
	if m.inside == nil {
		m.inside = map[VolumeName]probe.Result{}
	}
	for i := range m.Disks {
		d := &m.Disks[i]
		for j := range d.Partitions {
			p := &d.Partitions[j]
			if p.Map.Device != "" {
				m.inside[VolumeName(p.Name)], p.Map = p.Map.Content, Map{}
			} else if i := volumeOf(p.Partition); i >= 0 && p.encrypted() && m.inside[volumes[i].name].Kind == "" {
				m.inside[volumes[i].name] = probe.Result{Kind: probe.Ext4, Label: volumes[i].label, Size: p.Size() - 19*mib}
			}
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
	c := &model{State: m.State, lost: slices.Clone(m.lost), inside: maps.Clone(m.inside), open: maps.Clone(m.open)}
	c.Wiped = maps.Clone(m.Wiped)
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
