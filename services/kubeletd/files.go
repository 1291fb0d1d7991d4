package kubeletd

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// digest is short, because it is only compared with digests of the same file.
func digest(data []byte) string {
	if len(data) == 0 {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// mode is what a file's mode must be: its group may read, or everybody.
func (f File) mode() fs.FileMode {
	if f.Public {
		return 0o644
	}
	return 0o640
}

// seal is what State.Files holds for a file as it should be.
func seal(f File, content string) string {
	group := f.Group
	if f.Public {
		group = uid.Kubeletd
	}
	return fmt.Sprintf("%s %04o %d", content, f.mode(), group)
}

// disk is the runtime folder.
type disk struct {
	dir string
	// group maps a group to the one that files get; tests have only one.
	group func(uid.ID) int
}

// read returns the seal of a file; ok is false if there is none.
func (d disk) read(f File) (string, bool, error) {
	path := filepath.Join(d.dir, f.Path)
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", false, err
	}
	group := f.Group
	if f.Public {
		group = uid.Kubeletd
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Gid) != d.group(group) {
		group = uid.ID(st.Gid)
	}
	return fmt.Sprintf("%s %04o %d", digest(data), fi.Mode().Perm(), group), true, nil
}

// write replaces a file whole, with its group and mode, and makes its folder.
func (d disk) write(f File, data []byte) error {
	path := filepath.Join(d.dir, f.Path)
	if err := d.folder(f); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	group := f.Group
	if f.Public {
		group = uid.Kubeletd
	}
	if err := errors.Join(os.Chown(tmp, -1, d.group(group)), os.Chmod(tmp, f.mode())); err != nil { // in this order: nobody reads it too early
		return err
	}
	return os.Rename(tmp, path)
}

// folder makes the folders above a file: all but the last may be entered by everybody.
func (d disk) folder(f File) error {
	parts := strings.Split(filepath.Dir(f.Path), "/")
	at := d.dir
	for i, p := range parts {
		at = filepath.Join(at, p)
		if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		mode := fs.FileMode(0o755)
		if last := i == len(parts)-1; last && !f.Public {
			mode = 0o750
			if err := os.Chown(at, -1, d.group(f.Group)); err != nil {
				return err
			}
		}
		if err := os.Chmod(at, mode); err != nil {
			return err
		}
	}
	return nil
}

func (d disk) remove(path string) error {
	err := os.Remove(filepath.Join(d.dir, path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Stamps say with which inputs a unit was started last. They are beside the files, so that they live as long.
func (d disk) stamp(unit string) string { return filepath.Join(d.dir, "stamp", unit) }

func (d disk) stamps(units []string) (map[string]string, error) {
	out := map[string]string{}
	for _, u := range units {
		data, err := os.ReadFile(d.stamp(u))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		out[u] = string(data)
	}
	return out, nil
}

func (d disk) setStamp(unit, inputs string) error {
	if err := os.MkdirAll(filepath.Join(d.dir, "stamp"), 0o700); err != nil {
		return err
	}
	tmp := d.stamp(unit) + ".new"
	if err := os.WriteFile(tmp, []byte(inputs), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, d.stamp(unit))
}

// nodeAddress chooses the node's address by the rule that etcd's member follows, among the IPv4 ones. One that neither the document's endpoint nor the
// cluster vouches for must be on the interface of the default route, if there is one: that may get its address a moment later.
func nodeAddress(routes string, links []nodeaddr.Link, seen []netip.Addr, last, endpoint netip.Addr) netip.Addr {
	best := nodeaddr.Default(routes)
	own := slices.DeleteFunc(nodeaddr.Usable(links, best), func(p netip.Prefix) bool { return !p.Addr().Is4() })
	a := nodeaddr.Choose(own, seen, last, endpoint)
	vouched := slices.Contains(seen, a) || slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Addr() == a && p.Contains(endpoint) })
	if best == "" || vouched {
		return a
	}
	for _, l := range links {
		if l.Name == best && slices.ContainsFunc(l.Addresses, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return a
		}
	}
	return netip.Addr{}
}

// nameservers reads resolv.conf; addresses that mean something else inside a pod are left out.
func nameservers(resolv string) []netip.Addr {
	var out []netip.Addr
	for _, line := range strings.Split(resolv, "\n") {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(out) == 3 {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && !a.IsLoopback() && !a.IsUnspecified() && a.Zone() == "" {
			out = append(out, a)
		}
	}
	return out
}
