package storaged

import (
	"slices"
	"strings"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// fullShare is the free share of a volume below which it counts as full, in percent.
const fullShare = 1

func (s Space) full() bool { return s.Free < s.Size/100*fullShare }

// remedy is what a person can do about a full volume.
var remedy = map[VolumeName]string{
	StateVolume: "it holds configurations and keys only: look in the log who writes there",
	VarVolume:   "delete pods that write much, or images that nobody uses; a larger disk is used after a restart",
}

// conditions says of each mounted volume whether there is room on it, and of each encrypted one whether it opens by itself. The text has no
// figures: it would be another one every minute.
func conditions(have State) (out []*controlv1.Condition) {
	for _, v := range volumes {
		if p, ok := have.partition(v.name); ok && p.encrypted() && p.Attributes&unformatted == 0 {
			out = append(out, unlocks(have, v, p))
		}
		s, mounted := have.Volumes[v.name]
		m := &controlv1.Condition{Name: string(v.name) + ".mounted", Help: "bhctl get volumes", Explains: true,
			Needs: []string{"storaged/" + string(v.name) + ".unlocks", "storaged/" + string(v.name) + ".unlocked", "storaged/converged"}}
		if out = append(out, m); !mounted {
			m.Trouble = string(v.name) + " is not mounted"
			continue
		}
		c := &controlv1.Condition{Name: string(v.name) + ".room", Help: "bhctl get volumes"}
		if s.full() {
			c.Trouble = string(v.name) + " is full: " + remedy[v.name]
		}
		out = append(out, c)
	}
	if where, disk := have.installed(); where == installWaiting || where == installMedium {
		out = append(out, &controlv1.Condition{Name: "install", Trouble: installTrouble(where, disk)})
	}
	slices.SortFunc(out, func(a, b *controlv1.Condition) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// Where an installation stands; storage.v1.Install says what the words mean.
const (
	installCopying    = "copying"
	installWaiting    = "waiting"
	installRestarting = "restarting"
	installMedium     = "medium"
	installRunning    = "running"
)

// installed says how things stand with the disk that the node is to run from; "" if there is none.
func (s State) installed() (string, Disk) {
	for _, d := range s.Disks {
		if d.installing() && !d.System {
			return installCopying, d
		}
	}
	home, err := s.home("")
	if home == nil || err != nil {
		return "", Disk{}
	}
	_, hasState := home.volume(volumeNamed(StateVolume))
	switch {
	case home.System:
		return installRunning, *home
	case !hasState || !home.bootable(): // volumes only, by Storage.disk
		return "", Disk{}
	case !s.Install.Began:
		return installMedium, *home
	case s.Install.Recovery:
		return installWaiting, *home
	}
	return installRestarting, *home
}

// restart asks for the restart that ends an installation, for the boot that has done it: a firmware that starts the medium again must not
// make the machine restart for ever.
func restart(have State) string {
	if where, disk := have.installed(); where == installRestarting {
		return "the system was installed on " + disk.String() + " and runs from there next"
	}
	return ""
}

func installTrouble(where string, d Disk) string {
	if where == installWaiting {
		return "the system is installed on " + d.Device + "; the machine restarts from there when the recovery key was written down: bhctl storage keys recovery"
	}
	return "the system is installed on " + d.Device + ", but the firmware started another disk: take that away, or put " + d.Device + " first in the firmware's order, and restart"
}

// unlocks says whether an encrypted volume is open, and will be after a restart without a person, where it has a key for that. One that only people
// can open has a condition of another name: updated leaves a version on trial that does not open what opens by itself.
func unlocks(have State, v volume, p Partition) *controlv1.Condition {
	c := &controlv1.Condition{Name: string(v.name) + ".unlocks", Help: "bhctl unlock"}
	alone := p.LUKS.Has(vault.TPM) || p.LUKS.Has(vault.KeyFile) || p.LUKS.Has(vault.Service)
	if !alone && !p.LUKS.Has(vault.State) {
		c.Name = string(v.name) + ".unlocked"
	}
	switch {
	case p.Map.Device == "":
		c.Trouble = string(v.name) + " is locked (" + have.why(p) + "): unlock it with its recovery key or passphrase (bhctl unlock)"
	case p.Why != "" && alone:
		c.Trouble = string(v.name) + " did not open by itself (" + p.Why + "): if that is as it should be, rotate its key (bhctl storage keys), else look who was at the machine"
	}
	return c
}
