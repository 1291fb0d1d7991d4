package derive

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/test/twin"
)

// Page is what docs/confinement has of a unit: its rights, from the unit, and what a run let it do; ended is how its process ended at the last stages.
// The same answers make the same text.
func Page(u unit.Unit, answers map[string]string, ended map[string]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s: what it may do\n\nWritten by `TestVMTwin` from a run in a virtual machine; [how to read it](README.md). Do not edit it: commit what the test wrote, after a review.\n\n", u.Name)
	b.WriteString("| right | |\n|---|---|\n")
	for _, r := range rights(u) {
		fmt.Fprintf(&b, "| %s | %s |\n", r[0], r[1])
	}
	groups := map[string]*group{}
	tried, through := 0, 0
	for _, p := range twin.Probes() {
		g := groups[p.Group]
		if g == nil {
			g = &group{refused: map[string][]string{}}
			groups[p.Group] = g
		}
		answer, ok := answers[p.ID()]
		if end := ended[p.ID()]; end != "" {
			answer, ok = end, true
		}
		if !ok {
			continue
		}
		tried++
		g.tried++
		switch {
		case done(answer), p.Group == twin.Descriptors:
			g.through = append(g.through, p)
			through++
		default:
			g.refused[answer] = append(g.refused[answer], p.Name)
		}
	}
	fmt.Fprintf(&b, "\n## What was tried\n\n%d probes; %d were let through. All others were refused, or there was nothing to be had.\n\n| what | tried | let through | how the others ended |\n|---|---|---|---|\n", tried, through)
	for _, name := range twin.Groups() {
		if g := groups[name]; g != nil && g.tried > 0 {
			fmt.Fprintf(&b, "| %s | %d | %d | %s |\n", name, g.tried, len(g.through), g.others())
		}
	}
	b.WriteString("\n## What was let through\n")
	for _, name := range twin.Groups() {
		g := groups[name]
		if g == nil || len(g.through) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n%s\n", wrap("**"+name+"**: "+g.list()))
	}
	return b.String()
}

// wrap breaks a text into lines of at most 160 characters.
func wrap(text string) string {
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		if n := len([]rune(word)); i > 0 && column+1+n > 160 {
			b.WriteByte('\n')
			column = n
		} else {
			if i > 0 {
				b.WriteByte(' ')
				column++
			}
			column += n
		}
		b.WriteString(word)
	}
	return b.String()
}

// group is what became of a group's probes.
type group struct {
	tried   int
	through []twin.Probe
	refused map[string][]string // names by answer
}

// others are the answers with their numbers, the most frequent first.
func (g *group) others() string {
	answers := slices.SortedFunc(maps.Keys(g.refused), func(a, b string) int {
		return cmp.Or(len(g.refused[b])-len(g.refused[a]), strings.Compare(a, b))
	})
	for i, a := range answers {
		what := words[a]
		if what == "" {
			what = a
		}
		answers[i] = strconv.Itoa(len(g.refused[a])) + " " + what
	}
	return strings.Join(answers, ", ")
}

// words are what answers mean.
var words = map[string]string{
	twin.Filter: "ended by the filter", twin.Door: "at the door", twin.List: "not on the list", twin.Unserved: "no such method", twin.Untried: "not tried",
	"ENOENT": "not there (ENOENT)", "ENXIO": "not there (ENXIO)", "ENODEV": "not there (ENODEV)",
}

// list names what was let through; calls of daemons by daemon.
func (g *group) list() string {
	var names []string
	last := ""
	for _, p := range g.through {
		name := p.Name
		if p.Group == twin.RPCs {
			name = strings.TrimPrefix(p.Method, "/")
			if p.Socket != last {
				name, last = p.Socket+": "+name, p.Socket
			}
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// rights are a unit's, in words.
func rights(u unit.Unit) (out [][2]string) {
	add := func(what string, list []string, none string) {
		text := none
		if len(list) > 0 {
			text = strings.Join(list, " ")
		}
		out = append(out, [2]string{what, text})
	}
	paths := func(what string, list []string) {
		if u.FilesAll {
			list = nil
			add(what, nil, "what modes allow")
			return
		}
		quoted := make([]string, len(list))
		for i, p := range list {
			quoted[i] = "`" + p + "`"
		}
		add(what, quoted, "nothing")
	}
	ports := func(what string, all bool, list []uint16) {
		text := "no port"
		if all {
			text = "every port"
		} else if len(list) > 0 {
			text = strings.Trim(fmt.Sprint(list), "[]")
		}
		out = append(out, [2]string{what, text})
	}
	var groups []string
	for _, g := range u.Groups {
		groups = append(groups, uid.ID(g).Name())
	}
	add("user", []string{fmt.Sprintf("%s (%d)", uid.ID(u.UID).Name(), u.UID)}, "")
	add("further groups", groups, "none")
	add("capabilities", unit.CapabilityNames(u.Capabilities), "none")
	add("network", []string{map[string]string{"none": "none: an empty one of its own", "host": "the machine's"}[u.Network]}, "")
	add("hidden from it", u.Hide, "nothing")
	paths("reads, by Landlock", u.Read)
	paths("writes, by Landlock", u.Write)
	if u.Volume != "" {
		add("these rules of Landlock are in force", []string{"from when " + u.Volume + " is mounted"}, "")
	}
	paths("runs besides itself", u.Execute)
	ports("listens on TCP by itself", u.BindAll, u.Bind)
	ports("connects by TCP", u.ConnectAll, u.Connect)
	add("gets as listeners from PID 1", u.Listen, "none")
	calls := "every one"
	if u.Syscalls != nil {
		calls = strconv.Itoa(len(u.Syscalls))
	}
	add("system calls", []string{calls}, "")
	if u.Syscalls != nil {
		add("sockets", u.Sockets, "none")
	}
	add("limits", []string{fmt.Sprintf("%d MiB of memory, %d processes and threads, %d descriptors", u.MemoryMax>>20, u.PidsMax, nofile(u))}, "")
	return out
}
