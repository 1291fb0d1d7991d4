// Package layout says how a disk with the system on it is divided: what the image builder writes and what an installation makes. STATE and
// VAR come behind it and are storaged's. It is only facts. The sizes never change: an upgrade must fit what an old image made.
package layout

import "github.com/bulkhead-os/bulkhead/internal/gpt"

const mib = 1 << 20

// Sizes, in bytes.
const (
	Start   = mib       // of the first partition
	ESPSize = 128 * mib // holds two kernel images
	// SlotSize is that of a ROOT partition.
	SlotSize = 256 * mib
	// TreeSize holds the hash tree of a full slot: 1/128 of it, a little for the upper levels, a superblock.
	TreeSize = 4 * mib
)

// Names of partitions.
const (
	ESP   = "ESP"
	RootA = "ROOT-A"
	TreeA = "VERITY-A"
	RootB = "ROOT-B"
	TreeB = "VERITY-B"
)

// A Part is one partition.
type Part struct {
	Name       string
	Type       gpt.GUID
	Size       int64 // bytes
	Attributes uint64
}

// Parts returns the partitions of the system, in their order on the disk, without a gap. The slice is the caller's.
func Parts() []Part {
	const slot = gpt.AttrReadOnly | gpt.AttrNoAutoMount
	return []Part{
		{ESP, gpt.EFISystem, ESPSize, gpt.AttrNoAutoMount},
		{RootA, gpt.Root, SlotSize, slot},
		{TreeA, gpt.RootVerity, TreeSize, slot},
		{RootB, gpt.Root, SlotSize, slot},
		{TreeB, gpt.RootVerity, TreeSize, slot},
	}
}

// Partitions returns the entries of the partition table. guid makes each one's unique GUID.
func Partitions(guid func(name string) gpt.GUID) (out []gpt.Partition) {
	next := int64(Start)
	for i, p := range Parts() {
		out = append(out, gpt.Partition{
			Number: i + 1, Type: p.Type, GUID: guid(p.Name), Name: p.Name, Attributes: p.Attributes,
			First: uint64(next / gpt.SectorSize), Last: uint64((next+p.Size)/gpt.SectorSize) - 1,
		})
		next += p.Size
	}
	return out
}
