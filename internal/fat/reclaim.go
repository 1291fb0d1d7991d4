package fat

import (
	"errors"
	"fmt"
)

// ErrFull says that a file does not fit.
var ErrFull = errors.New("the file system is full")

// Limits of what Reclaim walks through.
const (
	maxDepth = 8
	maxDirs  = 256
)

// Reclaim tidies up what power cuts have left: clusters that belong to nobody become free, a file that is there under two names loses
// one of them, remains of long names go, and the copies of the allocation table and the count of free clusters are made right. prefer is
// asked which of two names of one file stays. Anything else that is wrong is an error, and then nothing is changed.
func (v *Volume) Reclaim(prefer func(a, b string) string) error {
	r := reclaimer{v: v, owner: make([]bool, v.top+1), prefer: prefer}
	if err := r.walk(v.root, "", 0); err != nil {
		return fmt.Errorf("the file system is damaged: %w; repair it with fsck.vfat", err)
	}
	for _, do := range r.repairs {
		if err := do(); err != nil {
			return err
		}
	}
	for c := uint32(2); c <= v.top; c++ {
		if n := v.next(c); !r.owner[c] && n != free && n != bad {
			v.link(c, free)
		}
	}
	if v.stale {
		for s := range len(v.table) / sectorSize {
			v.dirty[s] = true
		}
	}
	if len(v.dirty) > 0 {
		if err := v.flush(); err != nil {
			return err
		}
		v.stale = false
	}
	return v.tellFree()
}

// A reclaimer walks through all directories and notes whose each cluster is.
type reclaimer struct {
	v       *Volume
	owner   []bool // by cluster
	dirs    int
	prefer  func(a, b string) string
	repairs []func() error
}

// take notes a chain's owner. A cluster that somebody has already is damage.
func (r *reclaimer) take(chain []uint32, path string) error {
	for _, c := range chain {
		if r.owner[c] {
			return fmt.Errorf("%s shares cluster %d with another file", path, c)
		}
		r.owner[c] = true
	}
	return nil
}

func (r *reclaimer) walk(first uint32, path string, depth int) error {
	if r.dirs++; depth > maxDepth || r.dirs > maxDirs {
		return errors.New("too many directories")
	}
	d, err := r.v.readDir(first)
	if err != nil {
		return fmt.Errorf("%s/: %w", path, err)
	}
	if err := r.take(d.chain, path+"/"); err != nil {
		return err
	}
	r.repairs = append(r.repairs, func() error { return r.v.clean(d) }, func() error { return r.v.dropOrphans(d) })
	named := map[uint32]entry{}
	for _, e := range d.entries {
		at := path + "/" + e.name
		if e.attr&attrVolume != 0 || e.name == "." || e.name == ".." || e.size == 0 && !e.isDir() {
			continue
		}
		if e.isDir() {
			if err := r.walk(e.first, at, depth+1); err != nil {
				return err
			}
			continue
		}
		if first, twice := named[e.first]; twice && first.size == e.size {
			loser := e
			if r.prefer(first.name, e.name) == e.name {
				loser = first
				named[e.first] = e
			}
			r.repairs = append(r.repairs, func() error { return r.v.strike(d, loser) })
			continue
		}
		named[e.first] = e
		f, err := r.v.chain(e.first, -1)
		if err == nil && int64(len(f))*r.v.cluster < e.size {
			err = fmt.Errorf("%d bytes in %d clusters", e.size, len(f))
		}
		if err == nil {
			err = r.take(f, at)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
	}
	return nil
}

// dropOrphans takes slots of long names without a file out of use.
func (v *Volume) dropOrphans(d *dir) error {
	if len(d.orphans) == 0 {
		return nil
	}
	sectors := map[int]bool{}
	for _, i := range d.orphans {
		d.slot(i)[0] = slotDeleted
		sectors[i/perSector] = true
	}
	for s := range sectors {
		if err := v.writeDir(d, s); err != nil {
			return err
		}
	}
	d.parse()
	return v.sync()
}
