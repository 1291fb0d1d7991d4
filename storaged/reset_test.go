package storaged

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
	"github.com/bulkhead-os/bulkhead/storaged/wipe"
)

// cutDisk is a disk in memory on which steps of a reset are done as linux does them.
type cutDisk struct {
	powercut.Device
	size  int64
	wiped map[VolumeName]wipe.How // since the start
}

func (d cutDisk) section(p gpt.Partition) powercut.Section {
	return powercut.Section{Device: d.Device, From: p.Start(), Length: p.Size()}
}

// look is what a kernel would have after a start from this disk.
func (d cutDisk) look(t *testing.T) State {
	t.Helper()
	out := Disk{Device: "/dev/vda", Size: d.size, SectorSize: 512, System: true}
	if err := out.read(d, nil); err != nil || !out.HasTable {
		t.Fatalf("the table is lost: %v, %s", err, out.TableError)
	}
	for i := range out.Partitions {
		p := &out.Partitions[i]
		p.Device, p.KernelStart, p.KernelSize = node(out.Device, p.Number), p.Start(), p.Size()
		s := d.section(p.Partition)
		p.Content, _ = probe.Read(s, s.Length)
		if h := vault.Look(s); h != nil {
			p.LUKS = *h
		}
	}
	return State{Disks: []Disk{out}, Wiped: d.wiped}
}

func (d cutDisk) edit(t *testing.T, change func(*gpt.Table)) {
	t.Helper()
	table, _, err := gpt.Read(d, d.size)
	if err != nil {
		t.Fatal(err)
	}
	change(&table)
	if err := table.WriteTo(d, d.size); err != nil {
		t.Fatal(err)
	}
}

// finish does what is planned without a spec, as a start does, until nothing is left.
func (d cutDisk) finish(t *testing.T) {
	t.Helper()
	for range resetRounds {
		have := d.look(t)
		steps := planReset(have)
		if len(steps) == 0 {
			return
		}
		if bare, err := planBare(have); err != nil || slices.ContainsFunc(bare, func(s Step) bool { return s.Op == opOpen || s.Op == opMount }) {
			t.Fatalf("a marked volume is used: %v, %v", bare, err)
		}
		for _, s := range steps {
			switch s.Op {
			case opLeave:
			case opDestroy:
				sec := d.section(*partOf(have, s.Number))
				d.wiped[s.Volume] = wipe.Kept
				if err := errors.Join(wipe.Overwrite(sec, sec.Length), wipe.Check(sec, sec.Length)); err != nil {
					t.Fatal(err)
				}
			case opDrop:
				d.edit(t, func(table *gpt.Table) { drop(table) })
			default:
				t.Fatalf("%s is no step of a reset", s)
			}
		}
	}
	t.Fatal("it does not end")
}

func partOf(s State, number int) *gpt.Partition {
	for i, p := range s.Disks[0].Partitions {
		if p.Number == number {
			return &s.Disks[0].Partitions[i].Partition
		}
	}
	return nil
}

// encryptedVolume returns the first bytes of a volume, its header, and the key that opens it.
func encryptedVolume(t *testing.T, size int64) ([]byte, *luks.Header, secret.Bytes) {
	t.Helper()
	whole := powercut.New(make([]byte, luks.DataOffset))
	h, vk, err := luks.Format(whole, luks.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := secret.New(20)
	if _, err := h.Update(whole, vk, luks.Change{Add: key, KDF: luks.Random}); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(whole.Content()[:size]), h, key
}

// TestResetPowerCut cuts the power at every write of a reset: afterwards the node has both volumes, as they were, or the next start destroys
// them. A copy of the header, with the key, opens nothing then.
func TestResetPowerCut(t *testing.T) {
	const size, volumeSize = 8 * mib, 2 * mib
	raw := powercut.New(make([]byte, size))
	d := cutDisk{raw, size, map[VolumeName]wipe.How{}}
	table := gpt.Table{DiskGUID: newGUID()}
	headers, keys := map[string]*luks.Header{}, map[string]secret.Bytes{}
	for i, name := range []string{"ROOT-A", "STATE", "VAR"} {
		p := part(i+1, name, gpt.Root, int64(1+2*i)*mib, volumeSize, "").Partition
		p.GUID = newGUID()
		if i > 0 {
			v := volumeNamed(VolumeName(name))
			p.Type = v.typ
			var content []byte
			content, headers[name], keys[name] = encryptedVolume(t, volumeSize)
			if _, err := d.WriteAt(content, p.Start()); err != nil {
				t.Fatal(err)
			}
		}
		table.Partitions = append(table.Partitions, p)
	}
	if err := table.WriteTo(d, size); err != nil {
		t.Fatal(err)
	}
	raw.Forget()
	d.edit(t, doom)
	d.finish(t)

	was, reset := 0, 0
	n := raw.Cuts(rand.New(rand.NewPCG(1, 2)), 6, func(m *powercut.Image) {
		cut := cutDisk{m, size, map[VolumeName]wipe.How{}}
		have := cut.look(t)
		marked := len(have.Disks[0].doomed())
		if len(have.Disks[0].Partitions) == 3 && marked == 0 {
			was++
			for name, h := range headers {
				p, ok := have.partition(VolumeName(name))
				if _, _, err := h.Open(cut.section(p.Partition), keys[name]); !ok || err != nil {
					t.Errorf("nothing is marked, but %s does not open: %v", name, err)
				}
			}
			return
		}
		reset++
		if marked == 1 {
			t.Error("one volume of two is marked")
		}
		cut.finish(t)
		if left := cut.look(t).Disks[0].Partitions; len(left) != 1 || left[0].Name != "ROOT-A" {
			t.Errorf("left on the disk: %v", left)
		}
		for _, p := range table.Partitions[1:] {
			s := cut.section(p)
			if _, _, err := luks.Read(s); !errors.Is(err, luks.ErrNone) {
				t.Errorf("%s: a header is left: %v", p.Name, err)
			}
			if _, _, err := headers[p.Name].Open(s, keys[p.Name]); !errors.Is(err, luks.ErrKey) {
				t.Errorf("%s: a copy of its header opens it: %v", p.Name, err)
			}
		}
	})
	if was == 0 || reset == 0 {
		t.Errorf("of %d cuts %d left all as it was, %d a reset node", n, was, reset)
	}
	t.Logf("%d cuts: %d as it was, %d reset", n, was, reset)
}

// An older image that finds a marked volume makes it anew, and leaves the mark. That one is in use, and never destroyed.
func TestResetOlderImage(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{5, 6} {
		m.Disks[0].part(n).Attributes |= doomed
	}
	m.boot()
	if steps := planReset(m.State); len(steps) > 0 {
		t.Errorf("volumes that are in use are to be destroyed: %v", steps)
	}
	if err := m.run(t, nil); err != nil || len(m.Mounts) != 2 {
		t.Errorf("they are not mounted: %v, %v", m.Mounts, err)
	}
}

// FuzzReset: from whatever is found, with a power cut after any step and files open or not, a reset ends with no volume of ours on its disk, and
// touches nobody else's data. The spec that the node still has makes nothing until it restarts.
func FuzzReset(f *testing.F) {
	f.Add([]byte{}, uint8(0), true)
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, uint8(3), false)
	f.Add([]byte{1, 0, 2, 0, 1, 1, 3, 3, 0, 5, 5, 2, 2, 2, 2}, uint8(2), true)
	testfuzz.Run(f, func(t *testing.T, data []byte, cut uint8, open bool) {
		m := (&gen{data}).machine()
		want := config.Storage{StateSize: 64 * mib}
		if m.run(t, &want) != nil {
			return // a node that does not work has nobody who could order it
		}
		home, err := m.home("")
		if home == nil || err != nil {
			return
		}
		device, foreigners := home.Device, foreignContent(m.State)
		m.open = map[VolumeName]bool{VarVolume: open}
		do := func(steps []Step) {
			t.Helper()
			for _, s := range steps {
				if err := m.do(s); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
		}
		do([]Step{{Op: opHold}, {Op: opDoom, Disk: device}})
		steps := planReset(m.State)
		do(steps[:min(int(cut), len(steps))])
		if int(cut) >= len(steps) { // no cut: what the loop does beside changes nothing
			for range resetRounds {
				next, err := plan(want, m.State)
				if err != nil || slices.ContainsFunc(next, func(s Step) bool { return s.Op == opAdd || s.Op == opMount }) {
					t.Fatalf("while it is reset: %v, %v", next, err)
				}
				do(next)
			}
			if rest, _ := plan(want, m.State); len(rest) > 0 {
				t.Fatalf("does not converge: %v", rest)
			}
		}
		m.boot()
		for range resetRounds {
			next, _ := planBare(m.State) // an error is another disk's, and keeps no step from being done (reconcile.Loop)
			do(next)
		}
		d := m.disk(device)
		if left := d.doomed(); len(left) > 0 {
			t.Fatalf("left: %v", left)
		}
		for _, v := range volumes {
			if p, ok := d.volume(v); ok {
				t.Fatalf("%s is there: %v", v.name, p)
			}
		}
		if got := foreignContent(m.State); !slices.Equal(got, foreigners) {
			t.Fatalf("foreign data changed from %v to %v", foreigners, got)
		}
	})
}

// TestResetVolumes destroys volumes on a real disk: of one a file is open, and of the other somebody has a mount that is not ours, so that only the
// next start takes them off.
func TestResetVolumes(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, true)
	want := &config.Storage{StateSize: 64 * mib}
	b.converge(want)
	const needle = "a secret that nobody may find"
	if err := os.WriteFile(b.root+"/state/machined/x", []byte(needle), 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := os.Create(b.root + "/var/lib/open")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	pod := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo there; exec sleep 100")
	there, err := pod.StdoutPipe()
	if err == nil {
		err = pod.Start()
	}
	if err == nil {
		_, err = there.Read(make([]byte, 8))
	}
	if err != nil {
		t.Fatal(err)
	}
	do := func(steps ...Step) {
		t.Helper()
		for _, s := range steps {
			if err := b.Do(t.Context(), s); err != nil {
				t.Fatalf("%s: %v", s, err)
			}
		}
	}
	do(Step{Op: opHold}, Step{Op: opDoom, Disk: b.loop.Name()})
	for range 2 {
		do(planReset(b.read())...)
	}
	if rest, err := plan(*want, b.read()); err != nil || len(rest) > 0 {
		t.Errorf("while it is reset: %v, %v", rest, err)
	}
	if _, err := busy.WriteString("more"); err == nil {
		err = busy.Sync()
		if err == nil {
			t.Error("a file on a volume that was destroyed can be written")
		}
	}
	marked := b.read().Disks[0].doomed()
	if len(marked) != 2 {
		t.Fatalf("marked: %v", marked)
	}
	for _, p := range marked {
		if !p.Busy || p.Content.Kind != probe.Empty {
			t.Errorf("%s: in use %v, it holds %v", p.Name, p.Busy, p.Content)
		}
	}
	busy.Close()
	if err := pod.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = pod.Wait()          // it was killed
	do(Step{Op: opRelease}) // as the folder, which lives as long as the machine runs
	b.wiped.Clear()
	b.reboot()
	for range 3 {
		if errs := b.round(nil); len(errs) > 0 {
			t.Fatal(errs)
		}
	}
	if have := b.read(); len(have.Disks[0].Partitions) != 4 || have.Wiped[StateVolume] == "" || have.Wiped[VarVolume] == "" {
		t.Errorf("left: %v, wiped: %v", have.Disks[0].Partitions, have.Wiped)
	}
	b.tool("sgdisk", "-v", b.file)
	if holds(t, b.file, needle) {
		t.Error("the data can be found on a disk that can forget")
	}
	b.converge(want) // and a new owner needs no word of permission
	b.checkMounts()
}

// holds reports whether a sparse file has a text somewhere.
func holds(t *testing.T, path, text string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := int64(0); ; {
		from, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return false
		}
		to, err2 := f.Seek(from, unix.SEEK_HOLE)
		data := make([]byte, to-from)
		if _, err3 := f.ReadAt(data, from); errors.Join(err, err2, err3) != nil {
			t.Fatal(errors.Join(err, err2, err3))
		}
		if bytes.Contains(data, []byte(text)) {
			return true
		}
		at = to
	}
}

// TestRemoveOS leaves nothing on a disk that a firmware could start.
func TestRemoveOS(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, true)
	b.converge(&config.Storage{StateSize: 64 * mib})
	if err := b.Do(t.Context(), Step{Op: opRemoveOS, Disk: b.loop.Name()}); err != nil {
		t.Fatal(err)
	}
	if out := b.tool("sgdisk", "-p", b.file); strings.Contains(out, "ROOT-A") || strings.Contains(out, "STATE") {
		t.Errorf("sgdisk:\n%s", out)
	}
	for n := 1; n <= 4; n++ {
		content := make([]byte, mib)
		if _, err := b.loop.ReadAt(content, int64(n)*mib); err != nil || len(bytes.Trim(content, "\x00")) > 0 {
			t.Errorf("partition %d is not empty: %v", n, err)
		}
	}
	if n := b.read().Disks[0]; n.HasTable || n.TableError != "" {
		t.Errorf("there is a table: %v", n)
	}
}

// destroy calls the service and returns the steps, the first that could not be taken back, and the facts.
func destroy(t *testing.T, conn *grpc.ClientConn, r *storagev1.DestroyRequest) (steps []string, begun int, facts string, err error) {
	t.Helper()
	begun = -1
	out, err := storagev1.NewDisposalClient(conn).Destroy(t.Context(), r)
	for err == nil {
		var p *storagev1.DestroyProgress
		if p, err = out.Recv(); err != nil {
			break
		}
		if len(p.Facts) > 0 {
			return steps, begun, strings.Join(p.Facts, "\n"), nil
		}
		if p.Begun && begun < 0 {
			begun = len(steps)
		}
		steps = append(steps, p.Step)
	}
	return steps, begun, facts, err
}

func TestDestroy(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	conn := serve(t, m, uid.Machined)
	for range 2 { // again is fine
		steps, begun, facts, err := destroy(t, conn, &storagev1.DestroyRequest{})
		if err != nil || begun != 0 || len(steps) == 0 {
			t.Fatalf("%v, from step %d on, %s, %v", steps, begun, facts, err)
		}
	}
	c := controlv1.NewControlClient(conn)
	spec := &controlv1.Spec{Generation: 7, Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Storage\n")}
	p, err := c.PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: spec})
	if err != nil || len(p.Steps) > 0 {
		t.Errorf("a spec makes volumes on a node that is being reset: %v, %v", p, err)
	}
	_, _, facts, err := destroy(t, conn, &storagev1.DestroyRequest{RemoveOs: true})
	if err != nil || !strings.Contains(facts, "The system is removed") {
		t.Errorf("%s, %v", facts, err)
	}
	if _, _, _, err := destroy(t, serve(t, machine(imageDisk("/dev/vda", 8*gib)), uid.Apid), &storagev1.DestroyRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("apid may destroy: %v", err)
	}
}

func TestWithSystem(t *testing.T) {
	volumes := func(d Disk) Disk {
		for i, v := range volumes {
			start, _ := free(d.table(), d.Size)
			d.Partitions = append(d.Partitions, part(8+i, string(v.name), v.typ, start, 64*mib, probe.Ext4))
		}
		return d
	}
	esp := part(7, "ESP", gpt.LinuxGeneric, 809*mib, 128*mib, "vfat")
	system, medium := imageDisk("/dev/vda", 8*gib), imageDisk("/dev/vda", 8*gib)
	system.Partitions = append(system.Partitions, esp)
	installed := imageDisk("/dev/vdb", 8*gib)
	installed.System, installed.Partitions = false, append(installed.Partitions, esp)
	for name, c := range map[string]struct {
		disks []Disk
		want  string
	}{
		"one disk":           {[]Disk{volumes(system)}, "/dev/vda"},
		"volumes apart":      {[]Disk{system, volumes(foreignTable("/dev/vdb", 8*gib))}, "/dev/vda"},
		"medium and disk":    {[]Disk{medium, volumes(installed)}, "/dev/vdb"},
		"nothing configured": {[]Disk{system}, "/dev/vda"},
		"not known":          {[]Disk{foreignTable("/dev/vdb", 8*gib)}, ""},
	} {
		if got := (State{Disks: c.disks}).withSystem(); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// The facts do not promise more than is so.
func TestDestroyFacts(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	m.open = map[VolumeName]bool{VarVolume: true}
	steps, _, facts, err := destroy(t, serve(t, m, uid.Machined), &storagev1.DestroyRequest{})
	if err != nil || strings.Count(facts, "NOT encrypted") != 2 || !strings.Contains(facts, "until the next start who has the disk") || !strings.Contains(facts, "VAR is still in use, and taken off the disk at the next start") {
		t.Errorf("%v, %s, %v", steps, facts, err)
	}
}

// A TPM that is not given back stops the reset while nothing has happened, unless force is set.
func TestDestroyTPM(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	m.TPM = vault.Machine{TPM: true, Owned: true, Capped: true}
	k := &fake{m: m}
	conn := serveKernel(t, k, noVault(t.TempDir()), t.TempDir()+"/none", who(uid.Machined))
	if _, begun, _, err := destroy(t, conn, &storagev1.DestroyRequest{}); !errs.Is(err, errs.Precondition) || begun >= 0 || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("begun at %d: %v", begun, err)
	}
	have, err := k.Read(t.Context())
	if _, ok := have.partition(StateVolume); err != nil || !ok || have.Reset || len(have.Disks[0].doomed()) > 0 {
		t.Errorf("it was changed: %v", err)
	}
	if _, _, facts, err := destroy(t, conn, &storagev1.DestroyRequest{Force: true}); err != nil || !strings.Contains(facts, "nobody knows any more") {
		t.Errorf("%s, %v", facts, err)
	}
}
