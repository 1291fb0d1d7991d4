package unmap

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestReadOnly(t *testing.T) {
	const maps = `00400000-00bab000 r-xp 00000000 fe:00 77                         /usr/lib/bulkhead/bulkheadd
00bab000-014b1000 r--p 007ab000 fe:00 77                         /usr/lib/bulkhead/bulkheadd
014b1000-01539000 rw-p 010b1000 fe:00 77                         /usr/lib/bulkhead/bulkheadd
01539000-0355a000 rw-p 00000000 00:00 0 
7f00000-7f01000 r--p 00000000 fe:00 78                           /usr/lib/other
7ffd1000-7ffd3000 r-xp 00000000 00:00 0                          [vdso]
nonsense
`
	want := Regions{{0x400000, 0xbab000}, {0xbab000, 0x14b1000}}
	if got := readOnly(maps, "/usr/lib/bulkhead/bulkheadd"); !slices.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

// A program that was dropped goes on, and has less mapped.
func TestDrop(t *testing.T) {
	resident := func() int {
		b, err := os.ReadFile("/proc/self/smaps_rollup")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), "\nRss:")
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := resident()
	Program().Drop()
	after := resident()
	if err := os.WriteFile(t.TempDir()+"/file", []byte("it goes on"), 0o600); err != nil {
		t.Error(err)
	}
	if after >= before {
		t.Errorf("%d kB are resident, %d were before", after, before)
	}
	t.Logf("%d kB resident before, %d after", before, after)
}
