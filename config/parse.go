package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Limits of a text.
const (
	MaxSize  = 1 << 20 // bytes
	maxDepth = 20      // nested lists and mappings
	maxMarks = 50_000  // characters that can begin a YAML node: bounds memory before the YAML parser runs
	maxDocs  = 64      // documents, empty ones too
	maxKept  = 1000    // problems kept until they are sorted; further ones are only counted
)

// Parse reads a text of any number of documents and fills in every default. The text is taken whole or refused whole:
// then the error is an *Error with a line for each problem. name is what messages call the text; "" is "document".
func Parse(name string, data []byte) (Set, error) {
	if name == "" {
		name = "document"
	}
	p := &parser{name: name, lines: map[string]int{}, bad: map[string]bool{}}
	var set Set
	if p.limits(data) {
		p.documents(&set, data)
	}
	set.fill()
	for _, c := range cross(set) {
		p.follow(c)
	}
	if err := p.err(); err != nil {
		return Set{}, err
	}
	return set, nil
}

// A parser collects what is wrong, and where fields stand.
type parser struct {
	name     string
	problems []Problem
	more     int             // problems that are only counted
	lines    map[string]int  // of every field that was written
	bad      map[string]bool // fields with a problem of their own
}

func (p *parser) problem(line int, at, format string, args ...any) {
	p.bad[at] = true
	if len(p.problems) == maxKept {
		p.more++
		return
	}
	p.problems = append(p.problems, Problem{p.name, line, at, fmt.Sprintf(format, args...)})
}

// follow adds a problem between fields, at the line of the field or of what holds it, unless the field is known to be wrong by itself.
func (p *parser) follow(c Problem) {
	at := c.Field
	for ; at != "" && p.lines[at] == 0; at = outer(at) {
	}
	if !p.bad[c.Field] {
		p.problem(p.lines[at], c.Field, "%s", c.Text)
	}
}

// outer returns the path of what holds the field: "A.b[0].c", "A.b[0]", "A.b", "A", "".
func outer(at string) string {
	return at[:max(strings.LastIndexAny(at, ".["), 0)]
}

func (p *parser) err() error {
	if len(p.problems) == 0 {
		return nil
	}
	sort.SliceStable(p.problems, func(i, j int) bool { return p.problems[i].Line < p.problems[j].Line })
	e := &Error{Problems: p.problems, More: p.more}
	if len(e.Problems) > maxProblems {
		e.More += len(e.Problems) - maxProblems
		e.Problems = e.Problems[:maxProblems]
	}
	return e
}

// limits refuses what must not reach the YAML parser.
func (p *parser) limits(data []byte) bool {
	if len(data) > MaxSize {
		p.problem(0, "", "%d bytes; at most %d are allowed", len(data), MaxSize)
		return false
	}
	if !utf8.Valid(data) {
		good := 0
		for good < len(data) {
			r, n := utf8.DecodeRune(data[good:])
			if r == utf8.RuneError && n == 1 {
				break
			}
			good += n
		}
		p.problem(1+bytes.Count(data[:good], []byte{'\n'}), "", "byte %#02x is not UTF-8; save the text as UTF-8", data[good])
		return false
	}
	marks := 0
	for _, c := range data {
		switch c {
		case '\n', ',', '[', '{', ':', '-', '?', '&', '*', '!':
			marks++
		}
	}
	if marks > maxMarks {
		p.problem(0, "", "more than %d lines, list entries and fields", maxMarks)
		return false
	}
	return true
}

func (p *parser) documents(set *Set, data []byte) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for range maxDocs {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			p.syntax(err)
			return
		}
		if len(n.Content) == 1 && n.Content[0].Tag != "!!null" {
			p.document(set, n.Content[0])
		}
	}
	p.problem(0, "", "more than %d documents", maxDocs-1)
}

// syntax takes the line out of "yaml: line 3: did not find …".
func (p *parser) syntax(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if digits, after, ok := strings.Cut(rest, ": "); ok {
			if n, e := strconv.Atoi(digits); e == nil {
				line, text = n, after
			}
		}
	}
	p.problem(line, "", "not YAML: %s", text)
}

// document reads one document into its field of set.
func (p *parser) document(set *Set, n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		p.problem(n.Line, "", "a document must be a mapping that starts with \"apiVersion: %s\" and \"kind: …\"", APIVersion)
		return
	}
	version, kind := header(n, "apiVersion"), header(n, "kind")
	versionOK := version != nil && version.Value == APIVersion
	switch {
	case version == nil:
		p.problem(n.Line, "", "apiVersion: missing; the only version is %s", APIVersion)
	case !versionOK:
		p.problem(version.Line, "", "apiVersion: %s is not known; the only version is %s, with the kinds %s", found(version.Value), APIVersion, strings.Join(kindNames(), ", "))
	}
	if kind == nil {
		p.problem(n.Line, "", "kind: missing; there are %s", strings.Join(kindNames(), ", "))
		return
	}
	target := set.slot(Kind(kind.Value))
	if !target.IsValid() {
		p.problem(kind.Line, "", "kind: %s: %s (%s)", found(kind.Value), noSuch("kind", kind.Value, kindNames()), APIVersion)
		return
	}
	if !versionOK {
		return // its fields may mean something else
	}
	if first := p.lines[kind.Value]; first != 0 {
		p.problem(kind.Line, "", "kind: a second %s; the first starts at line %d, write them as one", kind.Value, first)
		return
	}
	target.Set(reflect.New(target.Type().Elem()))
	p.mapping(n, target.Elem(), kind.Value, 1)
}

func header(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}
