package logs

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzKmsg: whatever stands in the kernel's log, much of it is said by hardware, comes out as one line of text.
func FuzzKmsg(f *testing.F) {
	f.Add("6,339,5140900,-;NET: Registered PF_INET6 protocol family\n SUBSYSTEM=net\n")
	f.Add("30,1,9223372036854775807,c;\xff\x00;x")
	f.Add("6,1,-1,-;before the start")
	testfuzz.Run(f, func(t *testing.T, record string) {
		level, at, text, ok := kmsgRecord(record)
		if !ok {
			if level != 0 || at != 0 || text != "" {
				t.Errorf("%q is no record, and says %d, %v, %q", record, level, at, text)
			}
			return
		}
		if clean := Clean(text); level < 0 || level > 7 || at < 0 || strings.Contains(text, "\n") || !utf8.ValidString(clean) || len(clean) > MaxLine {
			t.Errorf("%q is read as level %d at %v: %q", record, level, at, text)
		}
	})
}

// FuzzLine: a line on the disk, which may have rotted, comes out as text; what is written is read again.
func FuzzLine(f *testing.F) {
	f.Add([]byte("1700000000000000000 a line"))
	f.Add([]byte("-9223372036854775808 \xff"))
	testfuzz.Run(f, func(t *testing.T, record []byte) {
		l := Parse(record)
		if !utf8.ValidString(l.Text) || len(l.Text) > len(record) {
			t.Errorf("%q is read as %q", record, l.Text)
		}
		if l.Time.IsZero() {
			return
		}
		if again := Parse(fmt.Appendf(nil, "%d %s", l.Time.UnixNano(), l.Text)); !again.Time.Equal(l.Time) || again.Text != l.Text {
			t.Errorf("%q is read as %v, and that as %v", record, l, again)
		}
	})
}
