package boots

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// maxPanic bounds what is kept of a panic, in bytes: its end counts.
const maxPanic = 64 << 10

// A Record is one file that the kernel left in pstore: a part of its last lines.
type Record struct {
	Name string // dmesg-efi-179..., dmesg-ramoops-0
	Time time.Time
	Text string
}

// ReadPanic reads the kernel's last lines from a pstore, oldest first, with the names of the files that hold them; "" if there are none.
func ReadPanic(folder string) (text string, names []string, err error) {
	entries, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil, nil
	}
	var all []Record
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "dmesg-") {
			continue
		}
		info, ierr := e.Info()
		data, rerr := os.ReadFile(filepath.Join(folder, e.Name()))
		if err = errors.Join(err, ierr, rerr); ierr != nil || rerr != nil {
			continue
		}
		names = append(names, e.Name())
		all = append(all, Record{e.Name(), info.ModTime(), string(data)})
	}
	return assemble(all), names, err
}

// assemble puts parts in the order in which they were said. A firmware keeps small parts, of which the first is the newest.
func assemble(all []Record) string {
	type part struct {
		time     time.Time
		count, n int // of the event since the boot, and of the part in it
		text     string
	}
	var parts []part
	for _, r := range all {
		if strings.HasSuffix(r.Name, ".enc.z") {
			continue // the kernel could not unpack it
		}
		p := part{time: r.Time, text: r.Text}
		head, rest, _ := strings.Cut(r.Text, "\n")
		if what, after, ok := strings.Cut(head, "#"); ok && !strings.Contains(what, " ") {
			if n, _ := fmt.Sscanf(after, "%d Part%d", &p.count, &p.n); n == 2 {
				p.text = rest
			}
		}
		parts = append(parts, p)
	}
	sort.SliceStable(parts, func(i, j int) bool {
		a, b := parts[i], parts[j]
		switch {
		case !a.time.Equal(b.time):
			return a.time.Before(b.time)
		case a.count != b.count:
			return a.count < b.count
		}
		return a.n > b.n
	})
	var b strings.Builder
	for _, p := range parts {
		for line := range strings.Lines(p.text) {
			if rest, ok := strings.CutPrefix(line, "<"); ok { // the level: "<4>"
				if _, after, ok := strings.Cut(rest, ">"); ok {
					line = after
				}
			}
			b.WriteString(logs.Clean(strings.TrimSuffix(line, "\n")) + "\n")
		}
	}
	text := b.String()
	if len(text) > maxPanic {
		text = text[len(text)-maxPanic:]
		_, text, _ = strings.Cut(text, "\n")
	}
	return text
}
