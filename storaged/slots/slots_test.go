package slots

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
)

// views is what Get says, for comparison.
func views(t testing.TB, s *Store) string {
	t.Helper()
	r, err := s.Get(t.Context())
	must(t, err)
	var out []string
	for _, v := range r.Slots {
		text := v.Label + " " + string(v.Status)
		if v.Status != Empty {
			text += " " + v.Entry.File
		}
		if v.Running {
			text += " running"
		}
		if v.Next {
			text += " next"
		}
		out = append(out, text)
	}
	return strings.Join(out, "; ")
}

func want(t testing.TB, s *Store, text string) {
	t.Helper()
	if got := views(t, s); got != text {
		t.Fatalf("got  %s\nwant %s", got, text)
	}
}

// partition writes a part of the disk into a file, for tools.
func partition(t testing.TB, d *testDisk, name PartName) string {
	t.Helper()
	p, err := d.Open(name, Read)
	must(t, err)
	defer p.Close()
	b := make([]byte, p.Size())
	_, err = p.ReadAt(b, 0)
	must(t, err)
	file := filepath.Join(t.TempDir(), string(name))
	must(t, os.WriteFile(file, b, 0o600))
	return file
}

// TestLife is that of a machine: upgrade, trial, good, upgrade again, rollback. Tools that know nothing of us agree.
func TestLife(t *testing.T) {
	one, two, three := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0"), makeVersion(t, "0.3.0")
	disk, _ := install(t, one)
	s := newStore(disk, "0.1.0")
	want(t, s, "A good bulkhead_0001_0.1.0.efi running next; B empty")
	fetched := upgrade(t, s, two)
	if most := int64(mib + 600*kib); fetched > most {
		t.Errorf("%d bytes were fetched, though half of the root and most of the kernel are on the disk", fetched)
	}
	want(t, s, "A good bulkhead_0001_0.1.0.efi running; B on trial bulkhead_0002_0.2.0+3.efi next")
	run(t, "fsck.vfat", "-n", partition(t, disk, espName))
	run(t, "veritysetup", "verify", partition(t, disk, "ROOT-B"), partition(t, disk, "VERITY-B"), hexOf(two.root))
	run(t, "mcopy", "-i", partition(t, disk, espName), "::EFI/Linux/bulkhead_0002_0.2.0+3.efi", filepath.Join(t.TempDir(), "x"))

	if v, err := disk.start(one, two); err != nil || v.name != "0.2.0" {
		t.Fatal(v.name, err)
	}
	s = newStore(disk, "0.2.0")
	want(t, s, "A good bulkhead_0001_0.1.0.efi; B on trial bulkhead_0002_0.2.0+2-1.efi running next")
	if _, _, err := s.Begin(t.Context(), three.head.Raw, three.head.Signature, quiet); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "on trial") {
		t.Errorf("an upgrade during the trial: %v", err)
	}
	r, err := s.MarkGood(t.Context(), false)
	must(t, err)
	if r.Floor != 2 {
		t.Errorf("the epoch is %d after the version of epoch 2 was found good", r.Floor)
	}
	want(t, s, "A good bulkhead_0001_0.1.0.efi; B good bulkhead_0002_0.2.0.efi running next")
	upgrade(t, s, three)
	want(t, s, "A on trial bulkhead_0003_0.3.0+3.efi next; B good bulkhead_0002_0.2.0.efi running")
	back := func(version string, restart bool) {
		t.Helper()
		v, r, err := s.Rollback(t.Context())
		if err != nil || v != version || r != restart {
			t.Fatalf("rollback: %s, %v, %v; want %s, %v", v, r, err, version, restart)
		}
	}
	back("0.2.0", false) // cancels
	want(t, s, "A given up bulkhead_0003_0.3.0+0-9.efi; B good bulkhead_0002_0.2.0.efi running next")
	if _, _, err := s.Rollback(t.Context()); !errs.Is(err, errs.Precondition) {
		t.Errorf("a rollback to what was given up: %v", err)
	}
	upgrade(t, s, three)
	if v, err := disk.start(one, two, three); err != nil || v.name != "0.3.0" {
		t.Fatal(v.name, err)
	}
	s = newStore(disk, "0.3.0")
	back("0.2.0", true)
	want(t, s, "A given up bulkhead_0003_0.3.0+0-9.efi running; B good bulkhead_0002_0.2.0.efi next")
	back("0.2.0", true) // again: nothing more
	if _, err := s.MarkGood(t.Context(), false); !errs.Is(err, errs.Precondition) {
		t.Errorf("what was given up was marked good: %v", err)
	}
	if _, err := s.MarkGood(t.Context(), true); err != nil {
		t.Error(err)
	}
	back("0.2.0", true)
	want(t, s, "A good bulkhead_0003_0.3.0.efi running; B on trial bulkhead_0004_0.2.0+3.efi next")
	run(t, "fsck.vfat", "-n", partition(t, disk, espName))
	for name, n := range disk.opened {
		if n != 0 && name != espName { // start leaves that one open
			t.Errorf("%s is still open %d times", name, n)
		}
	}
}

// An upgrade that was interrupted goes on where it was: only what is missing is sent again.
func TestResume(t *testing.T) {
	one, two := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0")
	disk, _ := install(t, one)
	s := newStore(disk, "0.1.0")
	n, missing, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	first := send(t, s, n, two, missing, 9)
	s = newStore(disk, "0.1.0") // storaged died
	if err := s.WriteChunks(n, 1, 0, two.files[1][:10]); !errs.Is(err, errs.Conflict) {
		t.Errorf("chunks for a session that nobody knows: %v", err)
	}
	m, missing, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	s.Abort(m)
	m, again, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	if fmt.Sprint(again) != fmt.Sprint(missing) {
		t.Errorf("missing %v, and at another look %v", missing, again)
	}
	if _, err := s.Commit(t.Context(), m, quiet); !errs.Is(err, errs.Precondition) {
		t.Errorf("half an upgrade was committed: %v", err)
	}
	m, missing, err = s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	second := send(t, s, m, two, missing, 1<<30)
	if _, err := s.Commit(t.Context(), m, quiet); err != nil {
		t.Fatal(err)
	}
	if total := upgradeSize(t, one, two); first+second != total {
		t.Errorf("%d and %d bytes were sent, want %d together", first, second, total)
	}
	// Once more, with all of it there: nothing is sent, and the trial begins anew.
	if fetched := upgrade(t, s, two); fetched > int64(len(two.files[bundle.Kernel])) {
		t.Errorf("%d bytes were sent though the slot holds them", fetched)
	}
}

// upgradeSize is how much an upgrade sends that is not interrupted.
func upgradeSize(t testing.TB, from, to version) int64 {
	disk, _ := install(t, from)
	return upgrade(t, newStore(disk, from.name), to)
}

func TestRefusals(t *testing.T) {
	one, two := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0")
	disk, d := install(t, one)
	s := newStore(disk, "0.1.0")
	image := func(edit func(*bundle.Image)) bundle.Head { return makeVersion(t, "0.2.0", edit).head }
	foreign := two
	foreign.seal(t, key(2))
	large := two
	large.files[bundle.Root] = noise(9, rootMax+4096)
	large.seal(t, key(1))
	fat := two
	fat.files[bundle.Kernel] = noise(9, 34*mib)
	fat.seal(t, key(1))
	tampered := two.head
	tampered.Raw = bytes.Replace(tampered.Raw, []byte(`"0.2.0"`), []byte(`"0.2.1"`), 1)
	for what, c := range map[string]struct {
		head bundle.Head
		kind errs.Kind
		want string
	}{
		"tampered":     {tampered, errs.Invalid, "changed after it was signed"},
		"unsigned":     {bundle.Head{Raw: two.head.Raw}, errs.Invalid, "not signed"},
		"foreign":      {foreign.head, errs.Invalid, "signed by somebody else"},
		"truncated":    {bundle.Head{Raw: two.head.Raw[:200], Signature: two.head.Signature}, errs.Invalid, "changed after it was signed"},
		"epoch":        {image(func(i *bundle.Image) { i.Epoch = 1 }), errs.Precondition, "is of epoch 1"},
		"architecture": {image(func(i *bundle.Image) { i.Architecture = "arm64" }), errs.Precondition, "architecture arm64"},
		"minimum":      {image(func(i *bundle.Image) { i.Minimum = "0.1.5" }), errs.Precondition, "upgrade to 0.1.5 first"},
		"running":      {one.head, errs.Precondition, "runs already"},
		"too large":    {large.head, errs.Precondition, "a ROOT slot of this node has room for"},
		"full ESP":     {fat.head, errs.Precondition, "the EFI partition of this node has room for"},
	} {
		_, _, err := s.Begin(t.Context(), c.head.Raw, c.head.Signature, quiet)
		if !errs.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want …%s…", what, err, c.want)
		}
	}
	if n := d.Cuts(rand.New(rand.NewPCG(1, 1)), 1, func(*powercut.Image) {}); n > 1 {
		t.Error("a refusal wrote to the disk")
	}
	want(t, s, "A good bulkhead_0001_0.1.0.efi running next; B empty")

	// Chunks that are not those of the manifest.
	n, missing, err := s.Begin(t.Context(), two.head.Raw, two.head.Signature, quiet)
	must(t, err)
	f := two.head.Manifest.Files[1]
	good := two.files[1][:f.Chunks[0].Size+f.Chunks[1].Size]
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	for what, err := range map[string]error{
		"wrong":         s.WriteChunks(n, 1, 0, bad),
		"short":         s.WriteChunks(n, 1, 0, good[:len(good)-1]),
		"elsewhere":     s.WriteChunks(n, 1, 1, good),
		"none":          s.WriteChunks(n, 1, 0, nil),
		"no such file":  s.WriteChunks(n, 3, 0, good),
		"no such chunk": s.WriteChunks(n, 1, 10_000, good),
		"negative":      s.WriteChunks(n, 1, -1, good),
	} {
		if !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	send(t, s, n, two, missing, 1<<30)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Commit(ctx, n, quiet); !errors.Is(err, context.Canceled) {
		t.Errorf("a commit whose caller left: %v", err)
	}
	want(t, s, "A good bulkhead_0001_0.1.0.efi running next; B empty")
}

// What was written and is not there when it is read back is never started.
func TestDiskThatForgets(t *testing.T) {
	one, two := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0")
	lying := makeVersion(t, "0.3.0")
	lying.files[bundle.Kernel] = makeUKI(fmt.Sprintf("bulkhead bulkhead.verity=%s", one.root), 400*kib) // starts another root
	lying.seal(t, key(1))
	for what, c := range map[string]struct {
		v    version
		harm func(*testDisk)
		want string
	}{
		"root":                            {two, func(d *testDisk) { flip(t, d, "ROOT-B", 2*mib-1) }, "slot B: the data have the root hash"},
		"tree":                            {two, func(d *testDisk) { flip(t, d, "VERITY-B", 4096) }, "slot B: the hash tree is wrong"},
		"kernel":                          {two, func(d *testDisk) { flipKernel(t, d) }, "the kernel is another one"},
		"kernel that starts another root": {lying, func(*testDisk) {}, "the kernel starts root " + hexOf(one.root)},
	} {
		disk, _ := install(t, one)
		s := newStore(disk, "0.1.0")
		n, missing, err := s.Begin(t.Context(), c.v.head.Raw, c.v.head.Signature, quiet)
		must(t, err)
		send(t, s, n, c.v, missing, 1<<30)
		c.harm(disk)
		_, err = s.Commit(t.Context(), n, quiet)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "nothing starts it") {
			t.Errorf("%s: got %v, want …%s…", what, err, c.want)
		}
		want(t, s, "A good bulkhead_0001_0.1.0.efi running next; B empty")
		if what == "root" { // and the next try finds just the bad chunk
			n, missing, err := s.Begin(t.Context(), c.v.head.Raw, c.v.head.Signature, quiet)
			must(t, err)
			if len(missing) != 1 || missing[0].Count != 1 {
				t.Errorf("one bit is wrong, and %v is missing", missing)
			}
			send(t, s, n, c.v, missing, 1<<30)
			if _, err := s.Commit(t.Context(), n, quiet); err != nil {
				t.Error(err)
			}
		}
	}
	// A slot that has rotted is not gone back to.
	disk, _ := install(t, one)
	s := newStore(disk, "0.1.0")
	upgrade(t, s, two)
	disk.running = two.root
	s = newStore(disk, "0.2.0")
	must2(s.MarkGood(t.Context(), false))
	flip(t, disk, "ROOT-A", 5000)
	if _, _, err := s.Rollback(t.Context()); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "slot A is damaged") {
		t.Errorf("rollback to a damaged slot: %v", err)
	}
}

func must2(_ Report, err error) {
	if err != nil {
		panic(err)
	}
}

func flip(t testing.TB, d *testDisk, name PartName, at int64) {
	t.Helper()
	p, err := d.Open(name, Write)
	must(t, err)
	defer p.Close()
	b := make([]byte, 1)
	_, err = p.ReadAt(b, at)
	must(t, err)
	b[0] ^= 1
	_, err = p.WriteAt(b, at)
	must(t, err)
}

func flipKernel(t testing.TB, d *testDisk) {
	t.Helper()
	p, v, err := newStore(d, "").openESP(Write)
	must(t, err)
	defer p.Close()
	f, err := v.Open(kernelDir, tempName)
	must(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 3000)
	must(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b, 3000)
	must(t, err)
}
