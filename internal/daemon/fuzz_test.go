package daemon

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzTold reads lines of logs, which a daemon writes as it likes: what becomes an event is short, one line, and nothing that a terminal would obey.
func FuzzTold(f *testing.F) {
	for _, line := range []string{
		`{"level":"INFO","msg":"event","type":"access","about":"a","text":"somebody was refused"}`, `{"msg":"event","type":"x\u001b[2J","text":"a\nb\u001b[2Jc\u009bd"}`,
		`{"msg":"event","type":"x","text":"` + strings.Repeat("é", 5000) + `"}`, `{"x":"\"msg\":\"event\""}`, `{"msg":"event"`, "",
	} {
		f.Add(line)
	}
	testfuzz.Run(f, func(t *testing.T, line string) {
		e, ok := ReadTold(line)
		if !ok {
			return
		}
		for text, most := range map[string]int{e.Type: 32, e.About: maxAbout, e.Text: maxText} {
			if len(text) > most || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
				t.Errorf("%q is told as %+v", line, e)
			}
		}
		if e.Type == "" || e.Text == "" {
			t.Errorf("%q is told as %+v", line, e)
		}
	})
}
