package trustd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
)

// place says where the keys lie.
type place uint8

const (
	unknown  place = iota // a STATE volume is on the disk but not mounted yet: whether the node has an owner is not known
	volatile              // in the runtime folder: lost with the power
	durable               // on STATE
)

// Names in both folders. Each file is replaced whole, so that it is there or not.
const (
	identityFile = "identity.json" // made by Claim
	clusterFile  = "cluster.json"  // made by Bootstrap
	nodeFile     = "node.json"     // made by JoinCluster, with all keys of a node that joined; on the first node by trustd itself
	knownFile    = "known.json"    // what was last heard of the cluster; STATE only, no secret
	joiningFile  = "joining.json"  // keys of a node that tries to join; runtime folder only
	codeFile     = "claim-code"    // runtime folder only
	stateLabel   = "STATE"         // the partition's name, as the kernel shows it in uevent
	maxFile      = 4 << 20         // bytes; the largest has a list of nodes in it

	// stateWait is how long a STATE partition may take to be mounted. Other systems have partitions of that name too;
	// if it is ours after all, its keys win when it comes.
	stateWait = time.Minute
)

// settle brings the keys to where they belong and loads them. It looks at what is there, not at what happened, so
// that it may be repeated at any time and after a power cut at any moment:
//
//	STATE has keys           they are the node's; copies in the runtime folder are wiped
//	STATE, none on it        keys in the runtime folder are moved there, if any; else nobody owns the node
//	STATE is locked          wait for who has its key, however long: its keys are the node's
//	STATE is coming          wait: its keys are the node's; after stateWait take it for another system's
//	no STATE                 keys in the runtime folder, if any; else nobody owns the node
func (d *Daemon) settle() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.settleLocked()
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != d.problem {
		if d.problem = text; text != "" {
			d.log.Error("keys not settled", "err", text)
		}
		d.report()
	}
	return err
}

func (d *Daemon) settleLocked() error {
	if exists(d.cfg.StateDir) {
		if err := d.move(); err != nil {
			return err
		}
		return d.load(d.cfg.StateDir, durable)
	}
	if d.where == durable { // never look for another owner because a volume went away
		return fmt.Errorf("%s: it is gone; keys stay in memory until trustd ends", d.cfg.StateDir)
	}
	if d.setLocked() {
		return nil
	}
	_, err := os.Lstat(filepath.Join(d.cfg.Runtime, identityFile))
	if errors.Is(err, fs.ErrNotExist) && d.where == unknown && stateOnDisk(d.cfg.Blocks) {
		if d.cfg.Now().Sub(d.since) < stateWait {
			return nil
		}
		d.log.Error("volume STATE is there but was not mounted; the node can be claimed by whoever sees its console", "dur", stateWait.String())
	}
	return d.load(d.cfg.Runtime, volatile)
}

// setLocked looks whether STATE is locked, and says so, and again when the reason is another one: the first may be that the network is not up yet. A
// node that was claimed before, or could be, is not locked for that: its STATE is another disk's that came later. The caller holds d.mu.
func (d *Daemon) setLocked() bool {
	text, err := os.ReadFile(d.cfg.Locked)
	locked, reason := err == nil && d.where == unknown, string(text)
	if locked && (!d.locked || reason != d.reason) {
		d.show(lockedBanner(reason))
	}
	d.reason = reason
	if locked == d.locked {
		return locked
	}
	d.since = d.cfg.Now() // between being unlocked and being mounted there is a moment
	if d.locked = locked; locked {
		d.log.Warn("volume STATE is locked; nobody can be let in until somebody unlocks it")
		d.trust.Set(&trustv1.TrustState{Locked: true})
	}
	return locked
}

// settled reports whether there is nothing to look for any more.
func (d *Daemon) settled() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.where == durable && d.problem == ""
}

// load reads the keys of a folder, once per folder, and offers the node to be claimed if there are none.
func (d *Daemon) load(dir string, where place) error {
	if d.where == where {
		return nil
	}
	k, err := readKeyring(dir)
	if err != nil {
		return err
	}
	if k.owned() {
		d.code = ""
	} else if err := d.offer(); err != nil {
		return err
	}
	known := d.remembered(dir, k)
	if d.where == volatile && k.owned() && d.known != nil && strings.Contains(d.known.GetOsCa(), k.osPEM()) {
		known = d.known // the same node moves: it has heard more than it was told when it joined
	}
	d.where, d.known = where, known
	if where == durable {
		d.kept = known // it is from there
	}
	d.keys.Set(k)
	d.publish()
	d.report()
	d.log.Info("keys loaded", "folder", dir, "claimed", k.owned(), "bootstrapped", k.cluster != nil)
	return nil
}

// remembered is what the node knows of its cluster without asking. Without it a node starts as it was when it joined, until it hears more.
func (d *Daemon) remembered(dir string, k *keyring) *trustv1.TrustState {
	if !k.owned() {
		return nil
	}
	t, err := readKnown(dir, k.osPEM())
	if err != nil {
		d.log.Error("what was known of the cluster is lost: revocations too, until the cluster answers", "err", err.Error())
	}
	if t == nil && k.node != nil {
		t = k.node.state
	}
	return t
}

// offer makes the node claimable: by the key from outside, or by a code that outlives a restart of trustd but not of the machine.
func (d *Daemon) offer() error {
	if d.code != "" {
		return nil // offered already, before STATE came
	}
	key, err := readFile(d.cfg.ClaimKey)
	if err == nil {
		if d.code, err = claim.Normalize(string(key)); err != nil {
			return fmt.Errorf("%s: %w", d.cfg.ClaimKey, err)
		}
		d.show(banner(""))
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	path := filepath.Join(d.cfg.Runtime, codeFile)
	text, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		var code string
		if code, err = claim.NewCode(d.cfg.Random); err != nil {
			return err
		}
		text, err = []byte(code), writeFile(d.cfg.Runtime, codeFile, []byte(code))
	}
	if err != nil {
		return err
	}
	if d.code, err = claim.Normalize(string(text)); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	d.show(banner(string(text)))
	return nil
}

// move brings files from the runtime folder to STATE and wipes them. If STATE has an owner already, it is the older one, and wins. There is one file that
// makes a node somebody's, so that a power cut between two files leaves none without its owner.
func (d *Daemon) move() error {
	foreign, err := d.foreign()
	if err != nil {
		return err
	}
	for _, name := range []string{identityFile, clusterFile, nodeFile} {
		from, to := filepath.Join(d.cfg.Runtime, name), filepath.Join(d.cfg.StateDir, name)
		data, err := readFile(from)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if foreign {
			d.log.Warn("keys made in this boot are dropped: STATE has an owner's", "folder", d.cfg.StateDir)
			d.where = unknown // what was loaded from the runtime folder is void
		} else if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			if err := writeFile(d.cfg.StateDir, name, data); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		if err := wipe(from); err != nil {
			return err
		}
	}
	return nil
}

// foreign reports whether STATE has another owner than the runtime folder. If they are equal, the power failed between writing and wiping.
func (d *Daemon) foreign() (bool, error) {
	for _, name := range []string{identityFile, nodeFile} {
		data, err := readFile(filepath.Join(d.cfg.Runtime, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return false, err
		}
		for _, other := range []string{identityFile, nodeFile} {
			old, err := readFile(filepath.Join(d.cfg.StateDir, other))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			} else if err != nil {
				return false, err
			}
			if other != name || string(old) != string(data) {
				return true, nil
			}
		}
	}
	return false, nil
}

// stateOnDisk reports whether the kernel sees a partition named STATE.
func stateOnDisk(blocks string) bool {
	entries, err := os.ReadDir(blocks)
	if err != nil {
		return false
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(blocks, e.Name(), "uevent"))
		if err != nil {
			continue // it went away
		}
		for line := range strings.SplitSeq(string(text), "\n") {
			if line == "PARTNAME="+stateLabel {
				return true
			}
		}
	}
	return false
}

// readFile reads a small file.
func readFile(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxFile {
		return nil, fmt.Errorf("%s: %d bytes, at most %d are read", path, st.Size(), maxFile)
	}
	return os.ReadFile(path)
}

// writeFile writes dir/name so that after a power cut it has the old content or the new. Mode 0600.
func writeFile(dir, name string, data []byte) (err error) {
	temp := filepath.Join(dir, "."+name+".new")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, filepath.Join(dir, name))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", filepath.Join(dir, name), err), ignoreMissing(os.Remove(temp)))
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// wipe overwrites a file on a tmpfs, where that reaches the only copy, and removes it.
func wipe(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ignoreMissing(err)
	}
	st, err := f.Stat()
	if err == nil {
		_, err = f.WriteAt(make([]byte, min(st.Size(), maxFile)), 0)
	}
	return errors.Join(err, f.Close(), os.Remove(path))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
