package storaged

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
)

// planBare returns the steps before there is a spec: volumes that are there already are mounted, because machined's
// configuration lies on one of them. Nothing is written to a partition table and nothing is formatted.
//
// There is one exception: a reset that was begun goes on.
func planBare(have State) ([]Step, error) {
	steps := planReset(have)
	if have.Reset {
		return steps, nil
	}
	home, err := have.home("")
	if home == nil || err != nil {
		return steps, err
	}
	p := planner{have: have, disk: *home}
	p.use(false)
	return append(steps, p.steps...), p.err()
}

// plan returns the steps that lead to the spec, and why there is no way if there is none; then the steps still are worth doing:
// a disk that cannot be made larger is no reason not to mount it. Equal inputs give equal steps.
//
// While the node is being reset it wants nothing any more.
func plan(want config.Storage, have State) ([]Step, error) {
	steps := planReset(have)
	if target, err := have.target(want.Disk); have.Reset || err == nil && len(steps) > 0 && len(target.doomed()) > 0 {
		return steps, nil // the rest is seen when that is done
	}
	more, err := planVolumes(want, have)
	return append(steps, more...), err
}

func planVolumes(want config.Storage, have State) ([]Step, error) {
	if want.Filesystem != "" && want.Filesystem != "ext4" {
		return nil, errs.New(errs.Invalid, "Storage.filesystem: %q is not known; \"ext4\" is", want.Filesystem)
	}
	if want.Install.Wanted() {
		return planInstall(want, have)
	}
	target, err := have.target(want.Disk)
	device := ""
	if target != nil {
		device = target.Device
	}
	home, homeErr := have.home(device)
	if homeErr != nil {
		return nil, homeErr
	}
	if home != nil && (target == nil || home.Device != target.Device) {
		p := planner{have: have, disk: *home}
		p.use(false)
		if err == nil {
			err = errs.New(errs.Precondition, "STATE and VAR are on %s already, Storage.disk says %q: they are never moved; set Storage.disk to %q",
				home, want.Disk, home.Device)
		}
		return p.steps, errors.Join(err, p.err())
	}
	if err != nil {
		return nil, err
	}
	p := planner{have: have, want: want, disk: *target}
	if p.missing() {
		if err := p.make(); err != nil { // what is there already is used all the same
			p.errors = append(p.errors, err)
			p.disk = *target
		}
	} else if p.disk.Repair != "" && !p.disk.ReadOnly {
		p.add(Step{Op: opRepair, Disk: p.disk.Device})
	}
	p.use(true)
	return p.steps, p.err()
}

// target returns the disk that the spec means.
func (s State) target(disk string) (*Disk, error) {
	for i, d := range s.Disks {
		if d.Device == disk || ((disk == "" || disk == "system") && d.System) {
			return &s.Disks[i], nil
		}
	}
	var names []string
	for _, d := range s.Disks {
		names = append(names, d.String())
	}
	list := "there is no disk at all"
	if len(names) > 0 {
		list = "there are " + strings.Join(names, ", ")
	}
	if disk == "" || disk == "system" {
		return nil, errs.New(errs.Precondition, "the disk that the system was started from is not known; name one in Storage.disk: %s", list)
	}
	return nil, errs.New(errs.Precondition, "there is no disk %s; correct Storage.disk: %s", disk, list)
}

// home returns the disk that carries volumes of ours: that whose volumes are mounted, else the preferred one, else the system
// disk, else the only one. It is nil if there is none.
func (s State) home(prefer string) (*Disk, error) {
	var all []*Disk
	best, rank := (*Disk)(nil), 0
	for i := range s.Disks {
		d := &s.Disks[i]
		r := 0
		for _, v := range volumes {
			if p, ok := d.volume(v); ok {
				r = max(r, 1)
				if s.isMounted(v, p) {
					r = 4
				}
			}
		}
		if r == 0 {
			continue
		}
		all = append(all, d)
		if d.Device == prefer {
			r = max(r, 3)
		} else if d.System {
			r = max(r, 2)
		}
		if r > rank {
			best, rank = d, r
		}
	}
	if rank == 1 && len(all) > 1 {
		return nil, errs.New(errs.Precondition, "%s and %s both hold Bulkhead's STATE or VAR; take one of them away, or name one in Storage.disk", all[0], all[1])
	}
	return best, nil
}

// volume returns the partition of a volume, if there is one that may be used.
func (d Disk) volume(v volume) (Partition, bool) {
	if !d.HasTable {
		return Partition{}, false
	}
	i := slices.IndexFunc(d.Partitions, func(p Partition) bool { return v.owns(p.Partition) && !isDoomed(p.Partition) })
	if i < 0 {
		return Partition{}, false
	}
	return d.Partitions[i], true
}

// A planner collects steps for one disk, and changes its copy of the disk as they would.
type planner struct {
	have   State
	want   config.Storage
	disk   Disk
	steps  []Step
	errors []error
	spec   bool // there is a spec: more than mounting may be done
	capped bool // a step for it is among them
	state  bool // STATE is, or will be, mounted
	crypt  bool // STATE is, or will be, encrypted
	sealed bool // and has, or will have, a key in the TPM

	install bool // the system is to be on the disk, too
}

func (p *planner) add(s Step) { p.steps = append(p.steps, s) }

func (p *planner) fail(kind errs.Kind, format string, args ...any) {
	p.errors = append(p.errors, errs.New(kind, format, args...))
}

// err keeps the kind of a single error.
func (p *planner) err() error {
	if len(p.errors) == 1 {
		return p.errors[0]
	}
	return errors.Join(p.errors...)
}

func (p *planner) missing() bool {
	for _, v := range volumes {
		if _, ok := p.disk.volume(v); !ok {
			return true
		}
	}
	return false
}

// make adds the volumes that are missing.
func (p *planner) make() error {
	d := &p.disk
	switch {
	case d.Unreadable != "":
		return errs.New(errs.Precondition, "%s cannot be read: %s; %s", d, d.Unreadable, p.another())
	case d.ReadOnly && d.System && !p.want.Install.Wanted():
		return errs.New(errs.Precondition, "%s, which the system was started from, is read-only; say in Storage.install.disk which disk the system is to be installed to: %s", d, p.have.others(d))
	case d.ReadOnly:
		return errs.New(errs.Precondition, "%s is read-only; STATE and VAR must be written: %s, or make it writable", d, p.another())
	case d.SectorSize != gpt.SectorSize:
		return errs.New(errs.Precondition, "%s has sectors of %d bytes, only %d can be used; %s", d, d.SectorSize, gpt.SectorSize, p.another())
	}
	if _, ok := d.volume(volumeNamed(StateVolume)); !ok {
		if _, err := p.stateKeys(); err != nil { // before anything is written
			return err
		}
	}
	steps, err := p.clear()
	if err != nil {
		return err
	}
	if p.install {
		laid, err := p.lay()
		if err != nil {
			return err
		}
		steps = append(steps, laid...)
	}
	adds, err := p.place()
	if err != nil {
		return err
	}
	p.steps = append(p.steps, append(steps, adds...)...)
	return nil
}

// clear returns the steps that leave a good table without foreign partitions.
func (p *planner) clear() ([]Step, error) {
	d := &p.disk
	lost := func(what string) error {
		return errs.New(errs.Precondition, "%s holds %s, which would be lost; set Storage.wipe to true to allow that, or %s", d, what, p.another())
	}
	if !d.HasTable {
		what, step := d.Content.String(), Step{Op: opCreate, Disk: d.Device, Wipe: p.want.Wipe}
		if d.Content.Data() {
			step.Over = what
		}
		switch {
		case d.TableError != "":
			// It may be a table of ours: no wish of the user's covers that.
			return nil, errs.New(errs.Precondition, "%s has a damaged partition table (%s), so it cannot be told what would be lost; repair it, "+
				"or write zeros over the first and the last mebibyte, or %s", d, d.TableError, p.another())
		case d.Busy || d.System || slices.ContainsFunc(d.Partitions, func(q Partition) bool { return q.Busy }):
			return nil, errs.New(errs.Precondition, "%s holds %s and is in use; %s", d, what, p.another())
		case d.Content.Data() && !p.want.Wipe:
			return nil, lost(what)
		}
		d.HasTable, d.Partitions, d.Tail = true, nil, probe.Result{Kind: probe.Empty}
		return []Step{step}, nil
	}
	var steps []Step
	var names []string
	for _, q := range d.Partitions {
		if !foreign(q.Partition) {
			continue
		}
		names = append(names, q.describe())
		steps = append(steps, Step{Op: opRemove, Disk: d.Device, Device: q.Device, Number: q.Number, Start: q.Start(), Size: q.Size(), Over: q.describe(), Wipe: true})
		if q.Busy {
			return nil, errs.New(errs.Precondition, "%s holds %s, which is in use; %s", d, q.describe(), p.another())
		}
	}
	if len(names) > 0 && !p.want.Wipe {
		return nil, lost(strings.Join(names, ", "))
	}
	d.Partitions = slices.DeleteFunc(slices.Clone(d.Partitions), func(q Partition) bool { return foreign(q.Partition) })
	if d.Repair != "" {
		steps = append([]Step{{Op: opRepair, Disk: d.Device}}, steps...)
	}
	if len(names) == 0 && d.Tail.Data() && !p.want.Wipe {
		start, _ := free(d.table(), d.Size)
		return nil, lost(fmt.Sprintf("%s in the free space at %s (no partition, perhaps what an earlier installation left)", d.Tail, sizeText(start)))
	}
	return steps, nil
}

// place returns the steps that add the missing volumes behind all partitions.
func (p *planner) place() ([]Step, error) {
	d := &p.disk
	start, room := free(d.table(), d.Size)
	_, haveState := d.volume(volumeNamed(StateVolume))
	_, haveVar := d.volume(volumeNamed(VarVolume))
	if haveVar && !haveState {
		// Ours are made in the order STATE, VAR. A new STATE here would have a new owner, who would get the old one's data.
		return nil, errs.New(errs.Precondition, "%s holds VAR of a node whose STATE is gone; restore its partition table, or, to give the data up, "+
			"write zeros over the first and the last mebibyte, or %s", d, p.another())
	}
	state := int64(0)
	need := []string{}
	if !haveState {
		if state = int64(p.want.StateSize); state == 0 {
			state = defaultState
		}
		state = (state + align - 1) / align * align
		need = append(need, "STATE needs "+sizeText(state))
	}
	least := state
	if !haveVar {
		least += minVar
		need = append(need, "VAR at least "+sizeText(minVar))
	}
	if room < least {
		return nil, errs.New(errs.Precondition, "%s is too small: %s free behind its last partition, %s; use a disk of at least %s, or %s",
			d, sizeText(room), strings.Join(need, " and "), sizeText(start+least+align), p.another())
	}
	over := ""
	if d.Tail.Data() {
		over = d.Tail.String()
	}
	var steps []Step
	for _, v := range volumes {
		size := state
		if v.name == VarVolume {
			size = room - state
		}
		if _, ok := d.volume(v); ok || size == 0 {
			continue
		}
		n := nextNumber(d.Partitions)
		q := Partition{Partition: gpt.Partition{
			Number: n, Name: string(v.name), Type: v.typ, Attributes: unformatted,
			First: uint64(start / gpt.SectorSize), Last: uint64((start+size)/gpt.SectorSize) - 1,
		}}
		d.Partitions = append(d.Partitions, q)
		steps = append(steps, Step{Op: opAdd, Volume: v.name, Disk: d.Device, Device: node(d.Device, n), Number: n, Start: start, Size: size, Over: over, Wipe: p.want.Wipe})
		start, over = start+size, ""
	}
	return steps, nil
}

func nextNumber(all []Partition) int {
	n := 0
	for _, p := range all {
		n = max(n, p.Number)
	}
	return n + 1
}

// use opens and mounts the volumes and makes their entries; with a spec it formats and grows them too, and adds keys.
func (p *planner) use(spec bool) {
	p.spec = spec
	if _, ok := p.disk.volume(volumeNamed(StateVolume)); !ok && spec {
		p.cap()
	}
	for _, v := range volumes {
		q, ok := p.disk.volume(v)
		if !ok || (q.Attributes&unformatted != 0 && !spec) || !p.volume(v, &q) {
			continue
		}
		p.entries(v, q)
		if spec && v.name == VarVolume {
			p.grow(v, q)
		}
		if v.name == StateVolume {
			p.state = true
		}
	}
	if q, ok := p.disk.volume(volumeNamed(StateVolume)); ok && spec && p.state {
		p.keys(q)
	}
}

// step returns a step for a volume's partition as it is now.
func (p *planner) step(op Op, v volume, q Partition) Step {
	return Step{
		Op: op, Volume: v.name, Disk: p.disk.Device, Device: node(p.disk.Device, q.Number), Number: q.Number, Start: q.Start(), Size: q.Size(),
		Encrypted: q.encrypted() && q.Attributes&unformatted == 0,
	}
}

// volume brings one volume up to being mounted, and reports whether there is a way. One that is formatted anew changes q.
func (p *planner) volume(v volume, q *Partition) bool {
	d := &p.disk
	do := func(op Op) { p.add(p.step(op, v, *q)) }
	if q.Device != "" && q.KernelStart != q.Start() {
		p.fail(errs.Precondition, "%s of %s: the partition table says that it starts at byte %d, the kernel has %d; restart the machine", v.name, d, q.Start(), q.KernelStart)
		return false
	}
	if q.Device != "" && q.KernelSize > q.Size() {
		p.fail(errs.Precondition, "%s of %s: the partition table says %s, the kernel has %s; restart the machine", v.name, d, sizeText(q.Size()), sizeText(q.KernelSize))
		return false
	}
	if q.Device == "" || q.KernelSize < q.Size() {
		do(opTell)
	}
	mounted := p.have.isMounted(v, *q)
	if q.Attributes&unformatted != 0 {
		if mounted || q.Busy && q.Map.Device == "" {
			p.fail(errs.Internal, "%s on %s of %s is in use but marked as unformatted; restart the machine", v.name, q.Device, d)
			return false
		}
		return p.format(v, q)
	}
	if !p.unlocked(v, *q) || !p.readable(v, *q) {
		return false
	}
	if !mounted {
		if q.data().Content.Dirty {
			do(opFsck)
		}
		do(opMount)
	}
	return true
}

// grow makes VAR as large as it can be. It comes after the mount, which must not wait for it.
func (p *planner) grow(v volume, q Partition) {
	step := p.step(opGrow, v, q)
	size := p.grown(q)
	if size > 0 {
		step.Size = size
		p.add(step)
		step.Op = opTell
		p.add(step)
	}
	data := q.data()
	have := step.Size // that the file system could have
	if q.encrypted() {
		have -= q.LUKS.Offset
		if size > 0 || data.Device != "" && have > data.Size { // it is opened, if it is locked, before the partition grows
			step.Op = opGrowMap
			p.add(step)
		}
	}
	if size > 0 || (data.Content.Size > 0 && have-data.Content.Size >= slack) {
		step.Op = opGrowFS
		p.add(step)
	}
}

// readable checks that a formatted volume carries what we once made on it. What does not is for a person: it is never formatted.
func (p *planner) readable(v volume, q Partition) bool {
	c := q.data().Content // locked: unread
	if c.Kind == probe.Unread || (c.Kind == probe.Ext4 && c.Label == v.label) {
		return true
	}
	p.fail(errs.Precondition, "%s on %s of %s: found %s where the file system ext4 %q must be; it is never formatted again: repair it, or remove partition %d to start anew",
		v.name, node(p.disk.Device, q.Number), &p.disk, c, v.label, q.Number)
	return false
}

// grown returns the size that VAR could have, or 0 if it is not worth it.
func (p *planner) grown(q Partition) int64 {
	start, room := free(p.disk.table(), p.disk.Size)
	for _, o := range p.disk.Partitions {
		if o.First > q.First {
			return 0
		}
	}
	if room < slack || p.disk.ReadOnly || p.missing() { // the room is for what is missing
		return 0
	}
	return start + room - q.Start()
}

func (p *planner) entries(v volume, q Partition) {
	var seen map[string]found
	if p.have.isMounted(v, q) {
		seen = p.have.Entries[v.name]
	}
	for _, e := range entries {
		if e.volume != v.name {
			continue
		}
		switch seen[e.path] {
		case absent, skewed:
			s := p.step(opEntry, v, q)
			s.Entry = e
			p.add(s)
		case another:
			p.fail(errs.Precondition, "%s/%s: something else is in its place (wanted: %s); remove it", v.target, e.path, e)
		}
	}
}
