package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A process is what ps prints of one. Capabilities are masks, as in /proc.
type process struct {
	PID                               int
	Name                              string   // argv[0]; "" for a thread of the kernel
	UID, GID                          []uint32 // real, effective, saved, of the file system
	Groups                            []uint32
	Inheritable, Permitted, Effective uint64
	Bounding, Ambient                 uint64
	NoNewPrivs, Filtered              bool              // by seccomp
	Cgroup                            string            // "0::/bulkhead/apid"
	Namespaces                        map[string]string // "net": "net:[4026531840]"
	Limits                            map[string]string // of its control group: "memory.max": "67108864"
	NoFile                            uint64            // hard limit: no process can raise it for itself
	OOMScoreAdj                       int
	PSS, RSS                          uint64 // bytes; 0 for a thread of the kernel
}

// ps prints the processes in proc. One that ends meanwhile is left out.
func ps(out io.Writer, proc, cgroups string) error {
	dirs, err := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	if err != nil {
		return err
	}
	list := []process{}
	for _, dir := range dirs {
		p, err := inspect(dir, cgroups)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			return err
		}
		list = append(list, p)
	}
	return json.NewEncoder(out).Encode(list)
}

func inspect(dir, cgroups string) (process, error) {
	var text [5]string
	for i, name := range []string{"status", "cmdline", "cgroup", "limits", "oom_score_adj"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return process{}, err
		}
		text[i] = string(b)
	}
	p := parseStatus(text[0])
	p.PID, _ = strconv.Atoi(filepath.Base(dir))
	p.Name, _, _ = strings.Cut(text[1], "\x00")
	p.Cgroup = strings.TrimSpace(text[2])
	p.OOMScoreAdj, _ = strconv.Atoi(strings.TrimSpace(text[4]))
	for line := range strings.Lines(text[3]) {
		if rest, ok := strings.CutPrefix(line, "Max open files"); ok {
			p.NoFile = parse(strings.Fields(rest)[1], 10)
		}
	}

	p.Namespaces = map[string]string{}
	spaces, err := os.ReadDir(filepath.Join(dir, "ns"))
	if err != nil {
		return process{}, err
	}
	for _, e := range spaces {
		// A zombie has names here, and nothing behind them.
		p.Namespaces[e.Name()], _ = os.Readlink(filepath.Join(dir, "ns", e.Name()))
	}
	// Empty for a thread of the kernel, ESRCH for one that is ending.
	rollup, _ := os.ReadFile(filepath.Join(dir, "smaps_rollup"))
	for line := range strings.Lines(string(rollup)) {
		switch f := strings.Fields(line); f[0] {
		case "Pss:":
			p.PSS = parse(f[1], 10) << 10
		case "Rss:":
			p.RSS = parse(f[1], 10) << 10
		}
	}
	p.Limits = map[string]string{}
	_, group, _ := strings.Cut(p.Cgroup, "0::")
	for _, name := range []string{"memory.max", "pids.max", "cpu.weight"} {
		// The root group has no such files; other groups may lack a controller.
		if b, err := os.ReadFile(filepath.Join(cgroups, group, name)); err == nil {
			p.Limits[name] = strings.TrimSpace(string(b))
		}
	}
	return p, nil
}

func parseStatus(text string) (p process) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			continue
		}
		switch key {
		case "Uid":
			p.UID = ids(fields)
		case "Gid":
			p.GID = ids(fields)
		case "Groups":
			p.Groups = ids(fields)
		case "CapInh":
			p.Inheritable = parse(fields[0], 16)
		case "CapPrm":
			p.Permitted = parse(fields[0], 16)
		case "CapEff":
			p.Effective = parse(fields[0], 16)
		case "CapBnd":
			p.Bounding = parse(fields[0], 16)
		case "CapAmb":
			p.Ambient = parse(fields[0], 16)
		case "NoNewPrivs":
			p.NoNewPrivs = fields[0] == "1"
		case "Seccomp":
			p.Filtered = fields[0] == "2" // SECCOMP_MODE_FILTER
		}
	}
	return p
}

func ids(fields []string) (out []uint32) {
	for _, f := range fields {
		out = append(out, uint32(parse(f, 10)))
	}
	return out
}

// parse reads what the kernel wrote; "unlimited" becomes the greatest number.
func parse(s string, base int) uint64 {
	if s == "unlimited" {
		return ^uint64(0)
	}
	n, _ := strconv.ParseUint(s, base, 64)
	return n
}
