package config

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxProblems bounds the list in an Error; the rest is only counted.
const maxProblems = 20

// Problem is one thing wrong with a document.
type Problem struct {
	File  string // what the caller called the text; "" if the set did not come from one
	Line  int    // from 1; 0 if unknown
	Field string // path, for example "Network.interfaces[0].mtu"; "" if the text as a whole is meant
	Text  string // what was found and what is allowed
}

// String is one line, "node.yaml:12: Network.interfaces[0].mtu: …", without what is unknown.
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			b.WriteString(":" + strconv.Itoa(p.Line))
		}
		b.WriteString(": ")
	}
	if p.Field != "" {
		b.WriteString(p.Field + ": ")
	}
	b.WriteString(p.Text)
	return b.String()
}

// Error is all that is wrong with a text or a set, in the order of the text.
type Error struct {
	Problems []Problem // at most 20, at least one
	More     int       // how many more there are
}

// Error has one line for each problem.
func (e *Error) Error() string {
	lines := make([]string, 0, len(e.Problems)+1)
	for _, p := range e.Problems {
		lines = append(lines, p.String())
	}
	if e.More > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", e.More))
	}
	return strings.Join(lines, "\n")
}

// found quotes a value for a message, shortened.
func found(s string) string {
	const most = 64
	if len(s) > most {
		for s = s[:most]; s != "" && !utf8.ValidString(s); {
			s = s[:len(s)-1]
		}
		s += "…"
	}
	return strconv.Quote(s)
}

// Nearest returns the name that the person who wrote got probably meant, or "" if none is close.
func Nearest(got string, names []string) string {
	best, distance := "", max(2, len(got)/3)+1
	if len(got) > 64 {
		return ""
	}
	for _, n := range names {
		if strings.EqualFold(n, got) {
			return n
		}
		if d := edits(got, n); d < distance && d < len(n) {
			best, distance = n, d
		}
	}
	return best
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// noSuch says that a name is unknown, which was probably meant, and which there are.
func noSuch(what, got string, names []string) string {
	text := "no such " + what
	if n := Nearest(got, names); n != "" {
		text += "; nearest is " + n
	}
	return text + "; there are " + strings.Join(names, ", ")
}
