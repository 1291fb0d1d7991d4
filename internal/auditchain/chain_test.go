package auditchain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// made returns a log of n records, and its end.
func made(t testing.TB, n int) ([][]byte, Head) {
	t.Helper()
	h := Head{Chain: "c0ffee"}
	var lines [][]byte
	for i := range n {
		r := Record{Boot: "b", Kind: Call, Time: time.Unix(int64(i), 0).UTC(), Entry: json.RawMessage(fmt.Sprintf(`{"msg":"audit","who":"ann","method":"/x/%d"}`, i))}
		line, err := h.Next(&r)
		if err != nil {
			t.Fatal(err)
		}
		h = r.Head()
		lines = append(lines, line)
	}
	return lines, h
}

func check(lines [][]byte, torn []byte, whole bool, anchors ...Anchor) Report {
	v := Verifier{Anchors: anchors}
	for _, l := range lines {
		v.Add(l)
	}
	if len(torn) > 0 {
		v.Torn(torn)
	}
	return v.Report(whole)
}

// text is what is said of a log, shortened to line and fault.
func faults(r Report) string {
	var out []string
	for _, p := range r.Problems {
		out = append(out, fmt.Sprintf("%d %s %d", p.Line, p.Fault, p.Sequence))
	}
	return strings.Join(out, "; ")
}

// Whatever is done to a log that was anchored is found: no byte, no line, no order, no end can be another.
func TestNothingGoesUnnoticed(t *testing.T) {
	lines, head := made(t, 5)
	anchor := Anchor{Head: head, At: time.Unix(100, 0)}
	if r := check(lines, nil, true, anchor); r.Problems != nil || r.Records != 5 || r.Anchored != anchor {
		t.Fatalf("a whole log: %+v", r)
	}
	file := append(bytes.Join(lines, []byte{'\n'}), '\n')
	read := func(data []byte) Report {
		all := bytes.Split(data, []byte{'\n'})
		return check(all[:len(all)-1], all[len(all)-1], true, anchor)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range file {
		for range 3 {
			changed := bytes.Clone(file)
			changed[i] ^= byte(1 + random.IntN(255))
			if r := read(changed); r.Problems == nil {
				t.Fatalf("byte %d of %q made %q, and nothing is said", i, file[i], changed[i])
			}
		}
		if r := read(slices.Delete(bytes.Clone(file), i, i+1)); r.Problems == nil && i < len(file)-1 {
			t.Fatalf("byte %d was removed, and nothing is said", i)
		}
		if r := read(file[:i]); r.Problems == nil && i < len(file)-1 {
			t.Fatalf("cut after %d bytes, and nothing is said", i)
		}
	}
	for i := range lines {
		if r := check(slices.Delete(slices.Clone(lines), i, i+1), nil, true, anchor); r.Problems == nil {
			t.Errorf("record %d was removed, and nothing is said", i+1)
		}
		for j := range i {
			swapped := slices.Clone(lines)
			swapped[i], swapped[j] = swapped[j], swapped[i]
			if r := check(swapped, nil, true, anchor); r.Problems == nil {
				t.Errorf("records %d and %d changed places, and nothing is said", i+1, j+1)
			}
		}
	}
}

func TestSaysWhere(t *testing.T) {
	lines, head := made(t, 6)
	anchor := Anchor{Head: head, At: time.Unix(100, 0)}
	// other is a log with the same name and another past, each record of it sound by itself.
	other := func() [][]byte {
		h := Head{Chain: "c0ffee"}
		var out [][]byte
		for range 6 {
			r := Record{Kind: Call, Note: "forged"}
			line, err := h.Next(&r)
			if err != nil {
				t.Fatal(err)
			}
			h = r.Head()
			out = append(out, line)
		}
		return out
	}()
	with := func(f func(l [][]byte) [][]byte) [][]byte { return f(slices.Clone(lines)) }
	rotated := func() [][]byte { // 1 to 3 were deleted, and a record says so
		h, out := head, slices.Clone(lines[3:])
		r := Record{Kind: Rotated, First: 4}
		line, err := h.Next(&r)
		if err != nil {
			t.Fatal(err)
		}
		return append(out, line)
	}()
	for _, c := range []struct {
		name  string
		lines [][]byte
		torn  string
		part  bool
		want  string
	}{
		{"nothing", lines, "", false, ""},
		{"changed", with(func(l [][]byte) [][]byte { l[2] = bytes.Replace(l[2], []byte("ann"), []byte("bob"), 1); return l }), "", false, "3 changed 3"},
		{"the first one changed", with(func(l [][]byte) [][]byte { l[0] = bytes.Replace(l[0], []byte("ann"), []byte("bob"), 1); return l }), "", false, "1 changed 1"},
		{"removed", with(func(l [][]byte) [][]byte { return slices.Delete(l, 2, 4) }), "", false, "3 removed 5"},
		{"removed at the beginning", lines[2:], "", false, "1 removed 3"},
		{"a part begins anywhere", lines[2:], "", true, ""},
		{"rotated away", rotated, "", false, ""},
		{"more removed than rotated away", rotated[1:], "", false, "1 removed 5"},
		{"a second time", with(func(l [][]byte) [][]byte { return slices.Insert(l, 4, l[1]) }), "", false, "5 inserted 2"},
		{"a forged one between", with(func(l [][]byte) [][]byte { return slices.Insert(l, 4, other[1]) }), "", false, "5 inserted 2"},
		{"a forged one instead", with(func(l [][]byte) [][]byte { l[3] = other[3]; return l }), "", false, "4 changed 4; 5 changed 5"},
		{"changed places", with(func(l [][]byte) [][]byte { l[1], l[2] = l[2], l[1]; return l }), "", false, "3 reordered 2"},
		{"cut at the end", lines[:4], "", false, "0 cut 6"},
		{"cut in a line", lines[:5], string(lines[5][:30]), false, "6 cut 6; 0 cut 6"},
		{"another past", other, "", false, "0 rewritten 6"},
	} {
		if r := check(c.lines, []byte(c.torn), !c.part, anchor); faults(r) != c.want {
			t.Errorf("%s: got %q, want %q; %v", c.name, faults(r), c.want, r.Problems)
		}
	}
	// Without an anchor the end can be cut, and the whole replaced: that is what anchors are for.
	for name, l := range map[string][][]byte{"cut": lines[:4], "another past": other} {
		if r := check(l, nil, true); r.Problems != nil || r.Anchored.Sequence != 0 {
			t.Errorf("%s, without an anchor: %+v", name, r)
		}
	}
	// A log that began anew is no problem if the cluster has heard of it, and one if it has not.
	old := Anchor{Head: Head{Chain: "old", Sequence: 9, Hash: "x"}, At: time.Unix(50, 0)}
	if r := check(lines, nil, true, old, anchor); r.Problems != nil || r.Anchored != anchor || len(r.Earlier) != 1 || r.Earlier[0] != old {
		t.Errorf("a log that began anew, and was anchored: %+v", r)
	}
	if r := check(lines, nil, true, old); faults(r) != "0 cut 9" {
		t.Errorf("a log that began anew in secret: %+v", r)
	}
}

// A record's text decides about its hash, and nothing else: a later version's fields are read over, and count.
func TestParse(t *testing.T) {
	lines, _ := made(t, 1)
	for _, bad := range []string{"", "{}", string(lines[0]) + " ", strings.ToUpper(string(lines[0])), strings.Repeat("x", MaxLine+1)} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%.60q is taken for a record", bad)
		}
	}
	content := []byte(`{"chain":"c","seq":3,"kind":"call","time":"2026-01-01T00:00:00Z","prev":"p","later":1`)
	later := append(append(append(bytes.Clone(content), hashStart...), sum(content)...), hashEnd...)
	if r, err := Parse(later); err != nil || r.Sequence != 3 || r.Prev != "p" || r.Hash != sum(content) {
		t.Errorf("a later version's record: %+v, %v", r, err)
	}
}

func FuzzParse(f *testing.F) {
	lines, _ := made(f, 2)
	f.Add(lines[0])
	testfuzz.Run(f, func(t *testing.T, line []byte) {
		r, err := Parse(line)
		if err == nil && (r == nil || !bytes.Contains(line, []byte(r.Hash))) {
			t.Errorf("%q: %+v", line, r)
		}
		v := Verifier{}
		v.Add(line)
		v.Add(lines[1])
		v.Report(true)
	})
}
