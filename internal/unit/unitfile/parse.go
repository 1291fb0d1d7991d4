// Package unitfile reads unit files. It stands apart from package unit so that PID 1 does not link what reads JSON.
package unitfile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// file is unit.json as people write it.
type file struct {
	Name           string   `json:"name"`
	Exec           []string `json:"exec"`
	Env            []string `json:"env"`
	User           string   `json:"user"`
	Groups         []string `json:"groups"`
	Capabilities   []string `json:"capabilities"` // ["ALL"] is every one
	NewPrivileges  bool     `json:"new_privileges"`
	Network        string   `json:"network"`
	MountNamespace string   `json:"mount_namespace"`
	Holds          bool     `json:"holds"`
	Show           []string `json:"show"`
	Inside         string   `json:"inside"`
	Hide           []string `json:"hide"`
	Proc           string   `json:"proc"`
	Syscalls       []string `json:"syscalls"`
	Sockets        []string `json:"sockets"`
	Ioctls         []string `json:"ioctls"`
	Prctls         []string `json:"prctls"`
	Read           []string `json:"read"`
	Write          []string `json:"write"`
	Execute        []string `json:"execute"`
	Volume         string   `json:"volume"`
	Bind           any      `json:"bind"` // ports, or ["ALL"]
	Connect        any      `json:"connect"`
	Listen         []string `json:"listen"`
	Console        bool     `json:"console"`
	MemoryMax      string   `json:"memory_max"` // "64M"
	PidsMax        uint64   `json:"pids_max"`
	CPUWeight      uint64   `json:"cpu_weight"`
	Delegate       bool     `json:"delegate"`
	NoFile         uint64   `json:"nofile"`
	OOMScoreAdj    int      `json:"oom_score_adj"`
	Restart        string   `json:"restart"`
	Autostart      bool     `json:"autostart"`
	Late           bool     `json:"late"`
	NotifyReady    bool     `json:"notify_ready"`
	KillProcess    bool     `json:"kill_process"`
	StartTimeout   string   `json:"start_timeout"`
	StopTimeout    string   `json:"stop_timeout"`
	Owners         []string `json:"owners"`
	Runtime        string   `json:"runtime"` // "0750"
	Umask          string   `json:"umask"`   // "0022"
}

// Parse reads one unit file. Unknown and wrong fields are errors that name the field, what was found and what is allowed.
func Parse(data []byte) (unit.Unit, error) {
	var f file
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return unit.Unit{}, err
	}
	if dec.More() {
		return unit.Unit{}, fmt.Errorf("more than one JSON value")
	}
	u := unit.Unit{
		Name: f.Name, Exec: f.Exec, Env: f.Env, NewPrivileges: f.NewPrivileges, Network: f.Network, MountNamespace: f.MountNamespace,
		Holds: f.Holds, Show: f.Show, Inside: f.Inside,
		Hide: f.Hide, Proc: f.Proc, Listen: f.Listen, Console: f.Console, PidsMax: f.PidsMax, CPUWeight: f.CPUWeight, Delegate: f.Delegate,
		NoFile: f.NoFile, OOMScoreAdj: f.OOMScoreAdj, Restart: f.Restart, Autostart: f.Autostart, Late: f.Late, NotifyReady: f.NotifyReady, KillProcess: f.KillProcess,
	}
	var err error
	keep := func(e error) {
		if err == nil {
			err = e
		}
	}
	one := func(field, name string) uint32 {
		id, ok := uid.Lookup(name)
		if !ok {
			keep(fmt.Errorf("%s: no user %q; there are %s", field, name, strings.Join(uid.Names(), ", ")))
		}
		return uint32(id)
	}
	u.UID = one("user", f.User)
	for _, g := range f.Groups {
		u.Groups = append(u.Groups, one("groups", g))
	}
	for _, o := range f.Owners {
		u.Owners = append(u.Owners, one("owners", o))
	}
	for _, c := range f.Capabilities {
		bit := unit.Capability(c)
		if c == "ALL" {
			bit = unit.AllCapabilities
		}
		if bit == 0 {
			keep(fmt.Errorf("capabilities: no capability %q; write the names of capabilities(7) without CAP_, or ALL", c))
		}
		u.Capabilities |= bit
	}
	keep(f.confine(&u))
	u.MemoryMax, err = size(err, f.MemoryMax)
	u.StartTimeout, err = duration(err, "start_timeout", f.StartTimeout)
	u.StopTimeout, err = duration(err, "stop_timeout", f.StopTimeout)
	u.Runtime, err = mode(err, "runtime", f.Runtime)
	u.Umask, err = mode(err, "umask", f.Umask)
	if err != nil {
		return unit.Unit{}, err
	}
	return u, check(u)
}

func size(err error, s string) (uint64, error) {
	if err != nil || s == "" {
		return 0, err
	}
	var n uint64
	var letter string
	if _, e := fmt.Sscanf(s, "%d%s", &n, &letter); e == nil {
		if shift, ok := map[string]uint{"K": 10, "M": 20, "G": 30}[letter]; ok && n < math.MaxUint64>>shift {
			return n << shift, nil
		}
	}
	return 0, fmt.Errorf("memory_max: %q is not a size like \"64M\" (K, M or G)", s)
}

func mode(err error, field, s string) (uint32, error) {
	if err != nil || s == "" {
		return 0, err
	}
	var m uint32
	if _, e := fmt.Sscanf(s, "%o", &m); e != nil || m > 0o777 {
		return 0, fmt.Errorf("%s: %q is not a mode like \"0750\"", field, s)
	}
	return m, nil
}

func duration(err error, field, s string) (time.Duration, error) {
	if err != nil || s == "" {
		return 0, err
	}
	d, e := time.ParseDuration(s)
	if e != nil || d <= 0 {
		return 0, fmt.Errorf("%s: %q is not a duration like \"10s\"", field, s)
	}
	return d, nil
}

// check finds what makes no sense in one unit by itself.
func check(u unit.Unit) error {
	oneOf := func(field, got string, allowed ...string) error {
		for _, a := range allowed {
			if got == a {
				return nil
			}
		}
		return fmt.Errorf("%s: %q is none of %q", field, got, allowed)
	}
	if u.Name == "" || len(u.Name) > 31 || strings.ContainsAny(u.Name, "/ \x00") {
		return fmt.Errorf("name: %q must have 1 to 31 characters, no slash and no space", u.Name)
	}
	if len(u.Exec) == 0 || !path.IsAbs(u.Exec[0]) {
		return fmt.Errorf("exec: %q must start with an absolute path", u.Exec)
	}
	if err := oneOf("network", u.Network, "none", "host"); err != nil {
		return err
	}
	if err := oneOf("mount_namespace", u.MountNamespace, "", "shared"); err != nil {
		return err
	}
	if err := oneOf("proc", u.Proc, "", "host"); err != nil {
		return err
	}
	if err := oneOf("restart", u.Restart, "always", "on-failure", "never"); err != nil {
		return err
	}
	if (u.Holds || u.Inside != "") && (u.MountNamespace != "" || len(u.Hide) > 0 || u.UID != 0) || u.Holds && u.Inside != "" || !u.Holds && len(u.Show) > 0 {
		return fmt.Errorf("holds, inside, show: who holds namespaces for others or lives in such is root, hides nothing and has no mount_namespace; only who holds them shows")
	}
	for _, h := range slices.Concat(u.Hide, u.Show) {
		if !path.IsAbs(h) || path.Clean(h) != h {
			return fmt.Errorf("hide, show: %q is not a clean absolute path", h)
		}
	}
	for _, l := range u.Listen {
		var port uint16
		_, all := fmt.Sscanf(l, "tcp:%d", &port)
		_, own := fmt.Sscanf(l, "loopback:%d", &port)
		if l != "unix" && (all != nil && own != nil || port == 0) {
			return fmt.Errorf("listen: %q is neither \"unix\" nor \"tcp:PORT\" nor \"loopback:PORT\"", l)
		}
	}
	if u.OOMScoreAdj < -1000 || u.OOMScoreAdj > 1000 {
		return fmt.Errorf("oom_score_adj: %d is not within -1000 and 1000", u.OOMScoreAdj)
	}
	return nil
}

// Load reads every unit.json and *.unit.json of a source tree, sorted by name, and checks them against each other.
func Load(tree fs.FS) ([]unit.Unit, error) {
	var units []unit.Unit
	from := map[string]string{}
	err := fs.WalkDir(tree, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "out") {
			return fs.SkipDir
		}
		if d.IsDir() || (d.Name() != "unit.json" && !strings.HasSuffix(d.Name(), ".unit.json")) {
			return nil
		}
		data, err := fs.ReadFile(tree, p)
		if err != nil {
			return err
		}
		u, err := Parse(data)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		if first, twice := from[u.Name]; twice {
			return fmt.Errorf("%s: unit %q stands in %s already", p, u.Name, first)
		}
		from[u.Name] = p
		units = append(units, u)
		return nil
	})
	sort.Slice(units, func(i, j int) bool { return units[i].Name < units[j].Name })
	for _, u := range units {
		if u.Inside != "" && !slices.ContainsFunc(units, func(h unit.Unit) bool { return h.Holds && h.Name == u.Inside }) && err == nil {
			err = fmt.Errorf("%s: inside: no unit %q holds namespaces", from[u.Name], u.Inside)
		}
	}
	return units, err
}
