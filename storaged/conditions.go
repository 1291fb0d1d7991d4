package storaged

import (
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
)

// fullShare is the free share of a volume below which it counts as full, in percent.
const fullShare = 1

// remedy is what a person can do about a full volume.
var remedy = map[VolumeName]string{
	StateVolume: "it holds configurations and keys only: look in the log who writes there",
	VarVolume:   "delete pods that write much, or images that nobody uses; a larger disk is used after a restart",
}

// conditions says of each mounted volume whether there is room on it. The text has no figures: it would be another one every minute.
func conditions(have State) (out []*controlv1.Condition) {
	for _, v := range volumes {
		s, mounted := have.Volumes[v.name]
		if !mounted {
			continue
		}
		c := &controlv1.Condition{Name: string(v.name) + ".room"}
		if s.Free < s.Size/100*fullShare {
			c.Trouble = string(v.name) + " is full: " + remedy[v.name]
		}
		out = append(out, c)
	}
	return out
}
