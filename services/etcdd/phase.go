package etcdd

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// phase is where a member is on its way out, or to another beginning. It lies in a file of the data folder, so that a restart at any moment goes on from there; reset
// destroys it with all else.
type phase string

const (
	inCluster  phase = ""           // or on its way in, or not yet
	leaving    phase = "leaving"    // Leave was ordered: nothing else is done any more
	abandoning phase = "abandoning" // the same by force: no other member is asked
	left       phase = "left"       // and is done
	removed    phase = "removed"    // by somebody at another member; the data are still here
	restoring  phase = "restoring"  // a snapshot lies ready to take the member's place
)

const phaseFile = "bulkhead-phase"

// readPhase takes an unreadable file for an error: to join by mistake is worse than to wait.
func readPhase(dir string) (phase, error) {
	data, err := os.ReadFile(filepath.Join(dir, phaseFile))
	if errors.Is(err, fs.ErrNotExist) {
		return inCluster, nil
	}
	if err != nil {
		return "", err
	}
	switch p := phase(strings.TrimSpace(string(data))); p {
	case leaving, abandoning, left, removed, restoring:
		return p, nil
	default:
		return "", fmt.Errorf("%s: %.32q is no phase; known are leaving, abandoning, left, removed and restoring", filepath.Join(dir, phaseFile), p)
	}
}

// changePhase writes the phase, and returns what it was. If from is named and it was none of these, nothing is written, and the error's kind is Precondition. Orders and the
// loop may call it at once: none takes back an order that it did not know of.
func (m *member) changePhase(to phase, from ...phase) (phase, error) {
	m.phases.Lock()
	defer m.phases.Unlock()
	was, err := readPhase(m.cfg.DataDir)
	if err != nil && len(from) > 0 {
		return was, err
	}
	if len(from) > 0 && !slices.Contains(from, was) {
		return was, errs.New(errs.Precondition, "this node's etcd member is %s", cmp.Or(string(was), "in the cluster"))
	}
	return was, writePhase(m.cfg.DataDir, to)
}

// writePhase returns when it is on the disk. One at a time: see changePhase.
func writePhase(dir string, p phase) error {
	path := filepath.Join(dir, phaseFile)
	if p == inCluster {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return syncDir(dir)
	}
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(string(p) + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// hasData reports whether the folder holds a member: its log is what makes it one.
func hasData(dir string) (bool, error) {
	logs, err := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal"))
	return len(logs) > 0, err
}

// dropData deletes the member, its log last to be made and first to go: half a member must not look like one.
func dropData(dir string) error {
	member := filepath.Join(dir, "member")
	if err := os.RemoveAll(filepath.Join(member, "wal")); err != nil {
		return err
	}
	if err := os.RemoveAll(member); err != nil {
		return err
	}
	return syncDir(dir)
}
