package slots

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

// resident returns the memory of this process that is not a file's, in kB, and the most that it ever was.
func resident(t *testing.T) (now, most int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &now); err == nil {
			continue
		}
		_, _ = fmt.Sscanf(line, "VmHWM: %d kB", &most)
	}
	return now, most
}

// TestFullSize upgrades between two images of the size that real ones have, on a loop device, and says how long it took and what memory.
// BULKHEAD_BIG=1 runs it: it writes about a gibibyte.
func TestFullSize(t *testing.T) {
	if os.Getenv("BULKHEAD_BIG") == "" {
		t.Skip("writes a gibibyte; BULKHEAD_BIG=1 runs it")
	}
	const size, kernel = 150 * mib, 20 * mib
	one := bigVersion(t, "0.1.0", noise(1, size), kernel)
	changed := slices.Concat(noise(1, size)[:70*mib], noise(3, 20*mib), noise(1, size)[90*mib+123:], make([]byte, 123))
	two := bigVersion(t, "0.2.0", changed, kernel)
	_, disk := installSized(t, one, 128*mib, 256*mib, 4*mib)
	content := disk.Content()
	dev := attach(t, content)
	l := newBench(t, one.root, dev)
	content, disk = nil, nil
	_, _ = content, disk
	one.files, changed = [3][]byte{}, nil
	runtime.GC()
	debug.SetMemoryLimit(16 << 20) // as in the unit; more is taken if it must be
	debug.FreeOSMemory()
	before, _ := resident(t)
	must(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)) // VmHWM begins anew
	_, start := resident(t)
	s := newStore(l, "0.1.0")
	began := time.Now()
	n, missing, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	compared := time.Since(began)
	fetched := send(t, s, n, two, missing, 1<<30)
	written := time.Since(began)
	_, err = s.Commit(t.Context(), n, quiet)
	must(t, err)
	_, most := resident(t)
	t.Logf("» compare %s, write %d MiB of %d in %s, verify and commit %s; memory at most %d MiB more than before (%d MiB, most of it the test's images)",
		compared.Round(time.Millisecond), fetched/mib, two.head.Manifest.Size()/mib, (written - compared).Round(time.Millisecond), (time.Since(began) - written).Round(time.Millisecond), (most-start)/1024, before/1024)
	if most-start > 32*1024 {
		t.Errorf("an upgrade took %d kB more; the budget is 32 MiB", most-start)
	}
}

func bigVersion(t *testing.T, name string, root []byte, kernel int) version {
	t.Helper()
	v := version{name: name}
	v.files[bundle.Root] = root
	tree, err := verity.Build(bytes.NewReader(root), []byte(name), [16]byte{1})
	must(t, err)
	var b bytes.Buffer
	_, err = tree.WriteTo(&b)
	must(t, err)
	v.files[bundle.Tree], v.root = b.Bytes(), tree.Root
	v.files[bundle.Kernel] = makeUKI(fmt.Sprintf("bulkhead bulkhead.verity=%x bulkhead.epoch=2\x00", tree.Root), kernel)
	v.seal(t, key(1))
	return v
}
