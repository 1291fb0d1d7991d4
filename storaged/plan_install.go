package storaged

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
)

// An installation copies the system from the medium that it was started from to a disk. What there is to do is seen in the disk's table: while a partition
// has the mark unformatted, it does not hold what it should. STATE and VAR come before the copy, so that the configuration lies on the disk when
// power is cut, and the installation goes on by itself; the EFI partition's mark goes last, after what makes a firmware start the disk.

// laid reports whether a disk has the partitions of the system in their places; any whether it has one of those names at all.
func (d Disk) laid() (whole, any bool) {
	if !d.HasTable {
		return false, false
	}
	want := layout.Partitions(func(string) gpt.GUID { return gpt.GUID{} })
	whole = true
	for _, w := range want {
		i := slices.IndexFunc(d.Partitions, func(p Partition) bool { return p.Name == w.Name })
		any = any || i >= 0
		whole = whole && i >= 0 && d.Partitions[i].Number == w.Number && d.Partitions[i].First == w.First && d.Partitions[i].Last == w.Last && d.Partitions[i].Type == w.Type
	}
	return whole, any
}

// named returns the first partition of that name; the zero value if there is none.
func (d Disk) named(name string) Partition {
	if i := slices.IndexFunc(d.Partitions, func(p Partition) bool { return p.Name == name }); d.HasTable && i >= 0 {
		return d.Partitions[i]
	}
	return Partition{}
}

// bootable reports whether a disk is one that a firmware starts the whole system from.
func (d Disk) bootable() bool {
	whole, _ := d.laid()
	return whole && d.named(layout.ESP).Attributes&unformatted == 0
}

// installing reports whether an installation on the disk was begun and did not end.
func (d Disk) installing() bool {
	whole, _ := d.laid()
	return whole && d.named(layout.ESP).Attributes&unformatted != 0
}

// medium reports whether a disk is something to install from, and nothing to install to: it was started from, and can be taken out or cannot be upgraded.
func (d Disk) medium() bool {
	whole, _ := d.laid()
	return d.System && (d.Removable || d.ReadOnly || !whole)
}

// planInstall returns the steps towards a system on the disk that the spec chooses, with STATE and VAR.
func planInstall(want config.Storage, have State) ([]Step, error) {
	target, err := have.installTarget(want.Install.Disk)
	if err == nil && !target.System && !target.bootable() && have.Install.NoBoot != "" { // before anything is written
		err = errs.New(errs.Precondition, "the system cannot be installed: %s", have.Install.NoBoot)
	}
	if err != nil {
		home, homeErr := have.home("")
		if home == nil || homeErr != nil {
			return nil, err
		}
		p := planner{have: have, disk: *home} // what is there is used all the same
		p.use(false)
		p.errors = append(p.errors, err)
		return p.steps, p.err()
	}
	p := planner{have: have, want: want, disk: *target, install: !target.System}
	whole, _ := target.laid()
	if p.missing() || p.install && !whole {
		if err := p.make(); err != nil {
			p.errors = append(p.errors, err)
			p.disk, p.install = *target, false
		}
	} else if p.disk.Repair != "" && !p.disk.ReadOnly {
		p.add(Step{Op: opRepair, Disk: p.disk.Device})
	}
	p.use(true)
	p.copySystem()
	return p.steps, p.err()
}

// installTarget returns the disk to install to: that which holds STATE, if the system runs from it or it is one that the selector means, else the one that
// matches the selector.
func (s State) installTarget(want config.DiskSelector) (*Disk, error) {
	var found []*Disk
	var refused error
	for i := range s.Disks {
		d := &s.Disks[i]
		switch {
		case !d.matches(want):
		case d.medium():
			refused = errs.New(errs.Precondition, "%s is the medium that the system was started from; choose another disk with Storage.install.disk: %s", d, s.others(d))
		default:
			found = append(found, d)
		}
	}
	home, err := s.home("")
	if len(found) > 0 && err != nil { // two disks with volumes: the selector decides
		home, err = s.home(found[0].Device)
	}
	switch {
	case err != nil:
		return nil, err
	case home != nil && slices.Contains(found, home), home != nil && home.installing():
		return home, nil
	case home != nil && home.System && !slices.ContainsFunc(found, func(d *Disk) bool { _, any := d.laid(); return !any }):
		return home, nil // it runs from there; names of devices may have changed
	case home != nil:
		return nil, errs.New(errs.Precondition, "STATE and VAR are on %s already, and Storage.install.disk means another disk: they are never moved; correct Storage.install.disk, or take %s away", home, home.Device)
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0 && refused != nil:
		return nil, refused
	case len(found) == 0:
		return nil, errs.New(errs.Precondition, "no disk is like Storage.install.disk says (%s); correct it: %s", selectorText(want), s.others(nil))
	}
	return nil, errs.New(errs.Precondition, "%d disks are like Storage.install.disk says (%s); add what only one of them has, like serial or wwn: %s", len(found), selectorText(want), facts(found))
}

// matches reports whether a disk is like the selector says.
func (d Disk) matches(want config.DiskSelector) bool {
	sizes, err := config.ParseComparisons(want.Size)
	if want.Size != "" && err != nil {
		return false
	}
	for _, c := range sizes {
		if !c.Holds(uint64(d.Size)) {
			return false
		}
	}
	return (want.Device == "" || want.Device == d.Device) && (want.Transport == "" || want.Transport == d.Transport) &&
		like(want.Model, d.Model) && like(want.Serial, d.Serial) && like(want.WWN, d.WWN)
}

// like compares with a pattern in which * stands for any characters; "" fits everything.
func like(pattern, text string) bool {
	if pattern == "" {
		return true
	}
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	text, ok := strings.CutPrefix(text, parts[0])
	for _, p := range parts[1 : len(parts)-1] {
		at := strings.Index(text, p)
		if ok = ok && at >= 0; !ok {
			return false
		}
		text = text[at+len(p):]
	}
	return ok && strings.HasSuffix(text, parts[len(parts)-1])
}

// selectorText writes a selector as it stands in the document, on one line.
func selectorText(w config.DiskSelector) string {
	var all []string
	for _, f := range []struct{ name, value string }{
		{"device", w.Device}, {"transport", w.Transport}, {"model", w.Model}, {"serial", w.Serial}, {"wwn", w.WWN}, {"size", w.Size},
	} {
		if f.value != "" {
			all = append(all, f.name+": "+f.value)
		}
	}
	return strings.Join(all, ", ")
}

// others says which disks there are that something could be installed to.
func (s State) others(not *Disk) string {
	var all []*Disk
	for i := range s.Disks {
		if d := &s.Disks[i]; d != not && !d.medium() {
			all = append(all, d)
		}
	}
	if len(all) == 0 {
		return "there is no other disk"
	}
	return "there are " + facts(all)
}

// facts lists what a selector can ask for.
func facts(disks []*Disk) string {
	var all []string
	for _, d := range disks {
		t := d.Device + " (size " + sizeText(d.Size)
		for _, f := range []struct{ name, value string }{{"transport", d.Transport}, {"model", d.Model}, {"serial", d.Serial}, {"wwn", d.WWN}} {
			if f.value != "" {
				t += fmt.Sprintf(", %s %q", f.name, f.value)
			}
		}
		all = append(all, t+")")
	}
	return strings.Join(all, "; ")
}

// lay adds the partitions of the system to a disk that has none of them.
func (p *planner) lay() ([]Step, error) {
	d := &p.disk
	if whole, any := d.laid(); whole {
		return nil, nil
	} else if any || len(d.Partitions) > 0 {
		return nil, errs.New(errs.Precondition, "%s holds partitions of Bulkhead that are not as an installation makes them, and leave no room for the system; to give all on it up, "+
			"write zeros over its first and its last mebibyte, or %s", d, p.another())
	}
	parts := layout.Partitions(func(string) gpt.GUID { return gpt.GUID{} })
	if parts[len(parts)-1].Last >= gpt.LastUsable(d.Size) {
		return nil, errs.New(errs.Precondition, "%s is too small: the system alone needs %s; %s", d, sizeText(layoutEnd()), p.another())
	}
	for _, q := range parts {
		if q.Name == layout.ESP || q.Name == layout.RootA {
			q.Attributes |= unformatted
		}
		d.Partitions = append(d.Partitions, Partition{Partition: q})
	}
	return []Step{{Op: opLay, Disk: d.Device, Size: layoutEnd(), Wipe: p.want.Wipe}}, nil
}

// copySystem copies what the disk's marks say is missing.
func (p *planner) copySystem() {
	d := &p.disk
	if d.System && d.installing() { // the power was cut when all was done but the mark, or the system could not have been started from it
		p.add(Step{Op: opDone, Disk: d.Device})
	}
	if !p.install || !d.installing() {
		return
	}
	if slices.ContainsFunc(d.Partitions, func(q Partition) bool { return q.Device == "" && !p.isVolume(q) }) && !p.laying() {
		p.add(Step{Op: opLay, Disk: d.Device, Size: layoutEnd()})
	}
	if d.named(layout.RootA).Attributes&unformatted != 0 {
		p.add(Step{Op: opRoot, Disk: d.Device})
	}
	p.add(Step{Op: opBoot, Disk: d.Device})
}

func (p *planner) isVolume(q Partition) bool {
	return slices.ContainsFunc(volumes, func(v volume) bool { return v.owns(q.Partition) })
}

// laying reports whether the partitions are being made.
func (p *planner) laying() bool {
	return slices.ContainsFunc(p.steps, func(s Step) bool { return s.Op == opLay })
}

func layoutEnd() int64 {
	parts := layout.Partitions(func(string) gpt.GUID { return gpt.GUID{} })
	end := parts[len(parts)-1]
	return end.Start() + end.Size()
}

// another says how to choose another disk.
func (p *planner) another() string {
	if p.want.Install.Wanted() {
		return "choose another disk with Storage.install.disk"
	}
	return "name another disk in Storage.disk"
}
