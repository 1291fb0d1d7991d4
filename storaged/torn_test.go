package storaged

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/config"
)

// TestTornSuperblock: the kernel writes ext4's superblock, two sectors, without the journal when it mounts and unmounts. If the power fails between the
// two it refuses the file system, and e2fsck -p alone gives up. The volume must come back by itself, with what was on it; also a STATE of the
// smallest size, in which ext4 would have no room for a copy.
func TestTornSuperblock(t *testing.T) {
	isolate(t)
	for _, size := range []config.Size{64 * mib, 256 * mib} {
		b := newBench(t, 3*gib, true)
		b.converge(&config.Storage{StateSize: size})
		if err := os.WriteFile(b.root+"/state/machined/generation", []byte("1"), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the copy is a good one afterwards, too
			b.detachMounts()
			for _, number := range []int{5, 6} {
				tear(t, b.device(number))
			}
			if err := unix.Mount(b.device(5), b.root+"/state", "ext4", 0, ""); !errors.Is(err, unix.EFSBADCRC) {
				t.Fatalf("the kernel mounts a torn superblock: %v", err)
			}
			b.converge(nil)
			b.checkMounts()
			if text, err := os.ReadFile(b.root + "/state/machined/generation"); err != nil || string(text) != "1" {
				t.Errorf("%s: %q, %v", sizeText(int64(size)), text, err)
			}
		}
		b.detachMounts()
		for _, number := range []int{5, 6} {
			b.tool("e2fsck", "-f", "-n", b.device(number))
		}
	}
}

// tear makes the second sector of a superblock another one than the first was written with: it has the high byte of the time of the last write.
func tear(t *testing.T, device string) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	const at = 1024 + 0x274 // s_wtime_hi
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0]++
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestMended: only what a power cut can have torn is mended.
func TestMended(t *testing.T) {
	whole := make([]byte, superSize)
	copy(whole[0x68:], "an UUID of 16 by")
	seal := func(b []byte) []byte {
		binary.LittleEndian.PutUint32(b[checksumAt:], superSum(b))
		return b
	}
	seal(whole)
	change := func(at int, value byte) []byte {
		b := bytes.Clone(whole)
		b[at] = value
		return b
	}
	for _, c := range []struct {
		name         string
		torn, copied []byte
		want         string
	}{
		{"a mount", change(incompatAt, needsRecovery), whole, ""},
		{"an orphan", change(roCompatAt+2, orphanPresent>>16), whole, ""},
		{"times", change(0x274, 9), whole, ""},
		{"another UUID", change(0x68, 'x'), whole, "differs from its copy at byte 0x5c"},
		{"another size", change(0x04, 9), whole, "differs from its copy at byte 0x0"},
		{"another feature", change(incompatAt, 1), whole, "differs from its copy at byte 0x5c"},
		{"a bad copy", change(0x274, 9), change(0x200, 1), "the copy of the superblock is damaged too"},
	} {
		got, err := mended(c.torn, c.copied)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
			continue
		}
		if err != nil || !bytes.Equal(got, seal(bytes.Clone(c.torn))) || !bytes.Equal(got[:superSector], c.torn[:superSector]) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
