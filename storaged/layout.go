package storaged

import (
	"io/fs"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	// align is what partitions start and end at: no flash page or RAID stripe is larger in practice.
	align = mib
	// minVar is the least that VAR needs: a node without pods takes about a quarter of it.
	minVar = 2 * gib
	// defaultState is for a Storage document that was not filled in; config does so.
	defaultState = 256 * mib
	// slack is how much a partition or its file system may be short of what it could have. ext4 does not use a last block
	// group that is too small for its own tables, so that less could never be reached.
	slack = 16 * mib
)

// unformatted is set in the partition table's entry of a volume until its file system is whole. While it is set nobody has
// written anything there but mkfs, so mkfs may be done again; once it is gone the volume is never formatted any more.
// Bits 48 to 63 belong to the partition's type, and the type is ours.
const unformatted uint64 = 1 << 48

// doomed is set beside it when a volume is to be destroyed. Such a volume is never opened or mounted again, and storaged destroys it as soon as it sees
// it, whatever the configuration says. Alone the bit means nothing: an older image, which does not know it, formats what is unformatted and leaves it.
const doomed uint64 = 1 << 49

// isDoomed reports whether a volume's entry in the table says that it is to be destroyed.
func isDoomed(p gpt.Partition) bool { return p.Attributes&doomed != 0 && p.Attributes&unformatted != 0 }

// VolumeName is "STATE" or "VAR", as in the partition table.
type VolumeName string

// The volumes there are.
const (
	StateVolume VolumeName = "STATE"
	VarVolume   VolumeName = "VAR"
)

// A volume is a partition of ours with a file system on it. What is written here is on disks in the field: it is never changed.
type volume struct {
	name     VolumeName
	typ      gpt.GUID // together with the name it says that the partition is ours
	label    string   // of the file system
	target   string
	options  string // of the mount, sorted as the kernel prints them
	reserved int    // percent of the blocks that are kept for owner
	owner    uid.ID // who may use these, besides whoever has SYS_RESOURCE
}

// volumes is in the order in which they lie on the disk. VAR is last, so that it can grow.
var volumes = []volume{
	{StateVolume, gpt.MustGUID("5f0d3c4e-9b6a-4d0b-8a52-6c1e7b9a2d41"), "BULKHEAD-STATE", "/state", "nosuid,nodev,noexec", 0, uid.Root},
	{VarVolume, gpt.MustGUID("c2b7a9d0-31f4-4e6c-9d1b-0a85f3e64b72"), "BULKHEAD-VAR", "/var", "nosuid,nodev", 2, uid.Etcdd}, // containers run from it; etcd must be able to write when they have filled it
}

func volumeNamed(name VolumeName) volume {
	for _, v := range volumes {
		if v.name == name {
			return v
		}
	}
	panic("storaged: no volume " + string(name)) // names come from the table only
}

// owns reports whether a partition is this volume.
func (v volume) owns(p gpt.Partition) bool { return p.Name == string(v.name) && p.Type == v.typ }

// ours are the names of the image's own partitions.
var ours = map[string]bool{"ESP": true, "ROOT-A": true, "VERITY-A": true, "ROOT-B": true, "VERITY-B": true}

// foreign reports whether a partition belongs to somebody else.
func foreign(p gpt.Partition) bool {
	for _, v := range volumes {
		if v.owns(p) {
			return false
		}
	}
	return !ours[p.Name]
}

// An entry is a file that a volume must have: a folder, unless it is a marker or a link.
type entry struct {
	volume VolumeName
	path   string // below the mount point
	owner  uid.ID
	mode   fs.FileMode // permissions and the sticky bit
	link   string      // target, for a symbolic link
	marker bool        // an empty file
}

// exact reports whether owner and mode must stay as they are here. A folder of root's is left to the programs that run as root:
// containerd and the kubelet set modes themselves.
func (e entry) exact() bool { return e.owner != uid.Root && e.link == "" && !e.marker }

// entries is all that others count on, in the order in which it is made; docs/node.md says who.
var entries = []entry{
	{volume: StateVolume, path: ".mounted", mode: 0o444, marker: true},
	{volume: StateVolume, path: "machined", owner: uid.Machined, mode: 0o700},
	{volume: StateVolume, path: ownFolder, owner: uid.Storaged, mode: 0o700},
	{volume: StateVolume, path: "trustd", owner: uid.Trustd, mode: 0o700},
	{volume: StateVolume, path: "updated", owner: uid.Updated, mode: 0o700},

	{volume: VarVolume, path: ".mounted", mode: 0o444, marker: true},
	{volume: VarVolume, path: "run", link: "/run"},
	{volume: VarVolume, path: "tmp", mode: 0o777 | fs.ModeSticky},
	{volume: VarVolume, path: "lib", mode: 0o755},
	{volume: VarVolume, path: "lib/cni", mode: 0o700},
	{volume: VarVolume, path: "lib/containerd", mode: 0o700},
	{volume: VarVolume, path: "lib/etcd", owner: uid.Etcdd, mode: 0o700},
	{volume: VarVolume, path: "lib/kubelet", mode: 0o750},
	{volume: VarVolume, path: "lib/kubeletd", owner: uid.Kubeletd, mode: 0o700},
	{volume: VarVolume, path: "log", mode: 0o755},
	{volume: VarVolume, path: "log/containers", mode: 0o755},
	{volume: VarVolume, path: "log/kubernetes", mode: 0o755},
	{volume: VarVolume, path: "log/kubernetes/audit", owner: uid.KubeAPIServer, mode: 0o700},
	{volume: VarVolume, path: "log/pods", mode: 0o755},
}
