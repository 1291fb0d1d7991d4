package unitfile

import (
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/landlock"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// What Landlock lets a unit do with its paths. Device nodes are never made, and are asked nothing (ioctl) where they may only be read.
const (
	everything = landlock.Files
	mayRead    = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	mayWrite   = everything &^ (unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK)
	mayExecute = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE
)

// files are a unit's rules for files.
func files(u unit.Unit) (rules []unit.Rule) {
	add := func(access uint64, paths ...string) {
		for _, p := range paths {
			rules = append(rules, unit.Rule{Access: access, Path: p})
		}
	}
	add(mayExecute, u.Exec[0])
	add(mayExecute, u.Execute...)
	add(mayRead, u.Read...)
	add(mayWrite, u.Write...)
	return rules
}

// Sealed returns what a unit with a volume has to have in its environment, to put its own rules for files on itself; nil for any other.
func Sealed(u unit.Unit) []string {
	if u.Volume == "" {
		return nil
	}
	return []string{unit.VolumeEnv + "=" + u.Volume, unit.RulesEnv + "=" + landlock.Text(files(u))}
}

// Landlock returns what the kernel is to restrict for a unit (struct landlock_ruleset_attr), and what of it the unit may do.
//
// A process that Landlock keeps from any file may not mount either. Its own program a unit may always execute: that is how it is started.
func Landlock(u unit.Unit) (attr [3]uint64, rules []unit.Rule) {
	if u.FilesAll && u.BindAll && u.ConnectAll {
		return attr, nil
	}
	attr[2] = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	if !u.FilesAll {
		attr[0] = everything
		rules = files(u)
		if u.Volume != "" { // until it is there: see Sealed
			rules = append(rules, unit.Rule{Access: mayWrite, Path: "/"})
		}
	}
	listen := func(access uint64, every bool, ports []uint16) {
		if !every {
			attr[1] |= access
		}
		for _, p := range ports {
			rules = append(rules, unit.Rule{Access: access, Port: p})
		}
	}
	listen(unix.LANDLOCK_ACCESS_NET_BIND_TCP, u.BindAll, u.Bind)
	listen(unix.LANDLOCK_ACCESS_NET_CONNECT_TCP, u.ConnectAll, u.Connect)
	return attr, rules
}
