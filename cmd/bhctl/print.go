package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

// table is rows of text under a heading. The last column gives way when the terminal is too narrow.
type table struct {
	head []string
	rows [][]string
}

func newTable(head ...string) *table { return &table{head: head} }

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write lays the table out; width 0 means no limit (a pipe or a file).
func (t *table) write(w io.Writer, width int) error {
	widths := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for _, r := range all {
		for i, c := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	var b strings.Builder
	for _, r := range all {
		var line strings.Builder
		for i, c := range r {
			line.WriteString(c)
			if i < len(r)-1 {
				line.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2))
			}
		}
		b.WriteString(cut(strings.TrimRight(line.String(), " "), width))
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cut shortens a line to width characters and shows that it did.
func cut(s string, width int) string {
	if width <= 0 || utf8.RuneCountInString(s) <= width {
		return s
	}
	r := []rune(s)
	return string(r[:width-1]) + "…"
}

// width is the terminal's, or 0 if the output is no terminal.
func (a *app) width() int {
	f, ok := a.out.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0
	}
	w, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return w
}

// print writes a value as the user wants it: v as JSON or YAML, or the table.
// v is a proto message, a slice of them, or anything that encoding/json takes.
func (a *app) print(v any, tab func() *table) error {
	if a.fan != nil {
		return a.fan.print(a.node, v, tab)
	}
	if a.format == "table" {
		return tab().write(a.out, a.width())
	}
	data, err := toJSON(v)
	if err == nil && a.format == "yaml" {
		data, err = yaml.JSONToYAML(data)
	}
	if err != nil {
		return err
	}
	_, err = a.out.Write(data)
	return err
}

// toJSON gives stable JSON: two spaces, fields as in REST, defaults written out, a newline at the end.
// protojson varies its white space on purpose, so it is laid out again.
func toJSON(v any) ([]byte, error) {
	raw, err := compactJSON(v)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

func compactJSON(v any) ([]byte, error) {
	switch m := v.(type) {
	case proto.Message:
		raw, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		err = json.Compact(&b, raw)
		return b.Bytes(), err
	case []proto.Message:
		items := make([]json.RawMessage, len(m))
		for i := range m {
			raw, err := compactJSON(m[i])
			if err != nil {
				return nil, err
			}
			items[i] = raw
		}
		return json.Marshal(items)
	}
	return json.Marshal(v)
}

// bytesText is a size for people: 1536 → "1.5 KiB".
func bytesText(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
