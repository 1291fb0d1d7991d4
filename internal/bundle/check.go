package bundle

import "fmt"

// A Node is what an image must fit.
type Node struct {
	Architecture string // as Go writes it
	Version      string // that runs; "" if it is not known
	RootHash     Digest // that runs
	Epoch        int    // the lowest that may be installed
	// Room for each of the three files, in bytes. That for the kernel is what the EFI partition has free once the idle slot's kernel is gone.
	Room [fileCount]int64
}

// places is where the files go, for messages.
var places = [fileCount]string{"the EFI partition", "a ROOT slot", "a VERITY slot"}

// CheckUpgrade says why an image must not be installed on a node; nil if it may. It looks at nothing but its arguments. An older version
// is no reason: who installs it means it.
func CheckUpgrade(n Node, m Manifest) error {
	switch {
	case m.Architecture != n.Architecture:
		return fmt.Errorf("%s is for the architecture %s, this node is %s", m.Version, m.Architecture, n.Architecture)
	case m.RootHash == n.RootHash:
		return fmt.Errorf("%s runs already (root hash %s)", m.Version, m.RootHash)
	case m.Epoch < n.Epoch:
		return fmt.Errorf("%s is of epoch %d, this node takes only %d and later: images before that have a known hole", m.Version, m.Epoch, n.Epoch)
	case m.Minimum != "" && ValidVersion(n.Version) && CompareVersions(n.Version, m.Minimum) < 0:
		return fmt.Errorf("%s can be installed from %s or later, this node runs %s: upgrade to %s first", m.Version, m.Minimum, n.Version, m.Minimum)
	}
	for i, f := range m.Files {
		if f.Size > n.Room[i] {
			return fmt.Errorf("%s is too large: %s has %d bytes, %s of this node has room for %d", m.Version, f.Name, f.Size, places[i], n.Room[i])
		}
	}
	return nil
}
