package debian

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Mirror returns the URI of a Debian mirror: $BULKHEAD_MIRROR, or the first entry in the host's own apt sources
// that offers Debian's main component. No address is built in.
func Mirror() (string, error) {
	if m := os.Getenv("BULKHEAD_MIRROR"); m != "" {
		return m, nil
	}
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*.sources")
	lists, _ := filepath.Glob("/etc/apt/sources.list.d/*.list")
	for _, f := range slices.Concat(files, []string{"/etc/apt/sources.list"}, lists) {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		parse := parseList
		if strings.HasSuffix(f, ".sources") {
			parse = parseSources
		}
		for _, s := range parse(string(text)) {
			if s.debianMain() {
				return s.uri, nil
			}
		}
	}
	return "", errors.New("no Debian mirror in /etc/apt/sources.list*: set BULKHEAD_MIRROR to the address of one")
}

// A source is one line of apt's sources, or what one stanza says about one URI.
type source struct {
	uri                string
	suites, components []string
}

// debianMain tells the archive proper from its security and foreign neighbours, which carry only some packages.
func (s source) debianMain() bool {
	web := strings.HasPrefix(s.uri, "http://") || strings.HasPrefix(s.uri, "https://") || strings.HasPrefix(s.uri, "file:/")
	return web && strings.HasSuffix(strings.TrimRight(s.uri, "/"), "/debian") && slices.Contains(s.components, "main")
}

// parseList reads the one-line form: deb [options] uri suite component...
func parseList(text string) (out []source) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		if rest = strings.TrimSpace(rest); strings.HasPrefix(rest, "[") {
			_, rest, _ = strings.Cut(rest, "]")
		}
		if f := strings.Fields(rest); len(f) >= 2 {
			out = append(out, source{f[0], f[1:2], f[2:]})
		}
	}
	return out
}

// parseSources reads the deb822 form: stanzas of fields, continuation lines indented.
func parseSources(text string) (out []source) {
	for _, stanza := range strings.Split(strings.ReplaceAll(text, "\r", ""), "\n\n") {
		fields, key := map[string][]string{}, ""
		for line := range strings.Lines(stanza) {
			switch {
			case strings.HasPrefix(line, "#"):
			case strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t"):
				fields[key] = append(fields[key], strings.Fields(line)...)
			default:
				k, v, _ := strings.Cut(line, ":")
				key = strings.ToLower(strings.TrimSpace(k))
				fields[key] = strings.Fields(v)
			}
		}
		if e := fields["enabled"]; len(e) == 1 && strings.EqualFold(e[0], "no") || !slices.Contains(fields["types"], "deb") {
			continue
		}
		for _, uri := range fields["uris"] {
			out = append(out, source{uri, fields["suites"], fields["components"]})
		}
	}
	return out
}
