package unitfile

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/elastic/go-seccomp-bpf/arch"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// all stands for everything, where a list may.
const all = "ALL"

// confine reads what seccomp and Landlock are made from.
func (f *file) confine(u *unit.Unit) error {
	if err := f.calls(u); err != nil {
		return err
	}
	if err := f.files(u); err != nil {
		return err
	}
	var err error
	if u.Bind, u.BindAll, err = ports("bind", f.Bind); err != nil {
		return err
	}
	u.Connect, u.ConnectAll, err = ports("connect", f.Connect)
	return err
}

// calls reads the system calls and what three of them are allowed for.
func (f *file) calls(u *unit.Unit) error {
	if len(f.Syscalls) == 0 {
		return fmt.Errorf("syscalls: there are none; write groups and names of system calls, or [\"ALL\"]")
	}
	if slices.Equal(f.Syscalls, []string{all}) {
		if len(f.Sockets)+len(f.Ioctls)+len(f.Prctls) > 0 {
			return fmt.Errorf("sockets, ioctls, prctls: they mean nothing where all system calls are allowed")
		}
		return nil
	}
	for _, name := range f.Syscalls {
		group, ok := groups[name]
		if _, known := arch.X86_64.SyscallNames[name]; !ok && !known {
			return fmt.Errorf("syscalls: no system call %q; groups are %s", name, strings.Join(slices.Sorted(maps.Keys(groups)), ", "))
		}
		if !ok {
			group = []string{name}
		}
		u.Syscalls = append(u.Syscalls, group...)
	}
	if f.Volume != "" { // it puts its own rules on itself
		u.Syscalls = append(u.Syscalls, "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self")
	}
	var err error
	if u.Ioctls, err = numbers("ioctls", f.Ioctls, ioctls); err != nil {
		return err
	}
	if u.Prctls, err = numbers("prctls", append(slices.Clone(f.Prctls), "@basic"), prctls); err != nil {
		return err
	}
	u.Sockets = f.Sockets
	for _, s := range f.Sockets {
		if _, ok := sockets[s]; !ok {
			return fmt.Errorf("sockets: no family %q; there are %s", s, strings.Join(slices.Sorted(maps.Keys(sockets)), ", "))
		}
	}
	for _, c := range []struct {
		call   string
		needed bool
	}{{"socket", len(u.Sockets) > 0}, {"ioctl", len(u.Ioctls) > 0}, {"prctl", len(u.Prctls) > 0}} {
		if slices.Contains(f.Syscalls, c.call) {
			return fmt.Errorf("syscalls: %s is not written: it follows from %ss", c.call, c.call)
		}
		if c.needed {
			u.Syscalls = append(u.Syscalls, c.call)
		}
	}
	sort.Strings(u.Syscalls)
	u.Syscalls = slices.Compact(u.Syscalls)
	return nil
}

// numbers looks names up in a table of lists of numbers. The result is sorted, and nil if there is none.
func numbers(field string, names []string, table map[string][]uint32) ([]uint32, error) {
	var out []uint32
	for _, n := range names {
		list, ok := table[n]
		if !ok {
			return nil, fmt.Errorf("%s: no %q; there are %s", field, n, strings.Join(slices.Sorted(maps.Keys(table)), ", "))
		}
		out = append(out, list...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// files reads the paths.
func (f *file) files(u *unit.Unit) error {
	u.Volume = f.Volume
	if slices.Equal(f.Read, []string{all}) && slices.Equal(f.Write, f.Read) && len(f.Execute) == 0 {
		u.FilesAll = true
		if u.Volume != "" {
			return fmt.Errorf("volume: it means nothing where all files are allowed")
		}
		return nil
	}
	u.Read, u.Write, u.Execute = append(slices.Clone(readable), f.Read...), f.Write, f.Execute
	for _, l := range []struct {
		field string
		paths []string
	}{{"read", f.Read}, {"write", f.Write}, {"execute", f.Execute}} {
		for _, p := range l.paths {
			if !path.IsAbs(p) || path.Clean(p) != p || strings.Contains(p, "\x00") {
				return fmt.Errorf("%s: %q is not a clean absolute path; [\"ALL\"] must stand alone, and both in read and in write", l.field, p)
			}
		}
	}
	if below := func(p string) bool { return strings.HasPrefix(p, u.Volume+"/") }; u.Volume != "" && !slices.ContainsFunc(f.Read, below) && !slices.ContainsFunc(f.Write, below) {
		return fmt.Errorf("volume: neither read nor write has anything below %q", u.Volume)
	}
	return nil
}

// ports reads a list of TCP ports, or ["ALL"].
func ports(field string, value any) (list []uint16, every bool, err error) {
	values, ok := value.([]any)
	if !ok && value != nil {
		return nil, false, fmt.Errorf("%s: %v is not a list of ports", field, value)
	}
	if len(values) == 1 && values[0] == all {
		return nil, true, nil
	}
	for _, v := range values {
		n, ok := v.(float64)
		if !ok || n < 0 || n > 65535 || n != float64(uint16(n)) {
			return nil, false, fmt.Errorf("%s: %v is not a port, 0 to 65535, and [\"ALL\"] must stand alone", field, v)
		}
		list = append(list, uint16(n))
	}
	slices.Sort(list)
	return slices.Compact(list), false, nil
}
