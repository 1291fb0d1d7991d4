package landlock

import (
	"slices"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

func TestText(t *testing.T) {
	rules := []unit.Rule{{Access: 0xffff, Path: "/state/trustd"}, {Access: 0xc, Path: "/a b"}}
	got, err := Parse(Text(rules))
	if err != nil || !slices.Equal(got, rules) {
		t.Errorf("got %v, %v, want %v", got, err, rules)
	}
	for _, bad := range []string{"\n", "c\n", "c x\n", "g /x\n", "-1 /x\n", "/x c\n"} {
		if got, err := Parse(bad); err == nil {
			t.Errorf("%q: got %v, want an error", bad, got)
		}
	}
}
