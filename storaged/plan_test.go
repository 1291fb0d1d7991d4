package storaged

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

var update = flag.Bool("update", false, "write testdata anew")

// fits validates the table, with GUIDs made up.
func (d Disk) fits() error {
	t := d.table()
	t.DiskGUID = gpt.GUID{1}
	for i := range t.Partitions {
		t.Partitions[i].GUID = gpt.GUID{2, byte(i)}
	}
	return t.Validate(d.Size)
}

func part(number int, name string, typ gpt.GUID, start, size int64, c probe.Kind) Partition {
	return Partition{
		Partition: gpt.Partition{Number: number, Name: name, Type: typ, First: uint64(start / 512), Last: uint64((start+size)/512) - 1},
		Content:   probe.Result{Kind: c},
	}
}

// imageDisk is as "make up" makes it: the image at the front, free space behind.
func imageDisk(device string, size int64) Disk {
	return Disk{
		Device: device, Size: size, SectorSize: 512, System: true, HasTable: true,
		Content: probe.Result{Kind: probe.GPT}, Tail: probe.Result{Kind: probe.Empty},
		Repair: "backup copy is at sector 2097151, the disk ends later",
		Partitions: []Partition{
			part(1, "ROOT-A", gpt.Root, 1*mib, 400*mib, "squashfs"), part(2, "VERITY-A", gpt.RootVerity, 401*mib, 4*mib, "verity"),
			part(3, "ROOT-B", gpt.Root, 405*mib, 400*mib, "empty"), part(4, "VERITY-B", gpt.RootVerity, 805*mib, 4*mib, "empty"),
		},
	}
}

// otherDisk is one that the machine has besides.
func otherDisk(device string, size int64, c probe.Result) Disk {
	return Disk{Device: device, Size: size, SectorSize: 512, Content: c, Model: "WDC WD10"}
}

func machine(disks ...Disk) *model {
	m := &model{State: State{Disks: disks}}
	m.boot()
	for i := range m.Disks {
		if p := m.Disks[i].part(1); p != nil && p.Name == "ROOT-A" {
			p.Busy = true
		}
	}
	return m
}

// run does all that is planned, and fails if the planner asks for what must not be.
func (m *model) run(t *testing.T, want *config.Storage) error {
	t.Helper()
	var steps []Step
	var err error
	if want == nil {
		steps, err = planBare(m.State)
	} else {
		steps, err = plan(*want, m.State)
	}
	for _, s := range steps {
		if e := m.do(s); e != nil {
			t.Fatalf("%s: %v\nplan: %v", s, e, steps)
		}
	}
	return err
}

func foreignTable(device string, size int64, parts ...Partition) Disk {
	return Disk{Device: device, Size: size, SectorSize: 512, HasTable: true, Content: probe.Result{Kind: probe.GPT}, Tail: probe.Result{Kind: probe.Empty}, Partitions: parts}
}

// TestPlan writes down, for each situation, the steps and the error. Read testdata/plan.txt: it is the behaviour.
func TestPlan(t *testing.T) {
	linux := gpt.LinuxGeneric
	done := func(size int64, then func(*model)) *model {
		m := machine(imageDisk("/dev/vda", size))
		if err := m.run(t, &config.Storage{}); err != nil {
			t.Fatal(err)
		}
		if then != nil {
			then(m)
		}
		return m
	}
	vda := func(f func(*Disk)) func(*model) { return func(m *model) { f(&m.Disks[0]) } }
	reboot := func(m *model) { m.boot() }
	withTPM := func(m *model) *model {
		m.TPM = vault.Machine{TPM: true, ImageEpoch: 1}
		return m
	}
	crypt := func(want config.Storage, then func(*model)) *model {
		m := withTPM(machine(imageDisk("/dev/vda", 20*gib)))
		if err := m.run(t, &want); err != nil {
			t.Fatal(err)
		}
		if then != nil {
			then(m)
		}
		return m
	}
	luks2 := config.EncryptionLUKS2
	service := config.StorageKey{Kind: config.KeyService, Address: "10.0.0.9:4050", Pin: "sha256:00"}
	file := config.StorageKey{Kind: config.KeyFile, Partition: "KEY"}
	keys := func(k ...config.StorageKey) *config.Storage { return &config.Storage{Encryption: luks2, Keys: k} }
	auto := config.Storage{}
	tests := []situation{
		{"a new machine, before its configuration", nil, machine(imageDisk("/dev/vda", 20*gib))},
		{"a new machine", &config.Storage{Disk: "system", StateSize: 512 * mib}, machine(imageDisk("/dev/vda", 20*gib))},
		{"an nvme disk", &config.Storage{}, machine(imageDisk("/dev/nvme0n1", 20*gib))},
		{"nothing to do", &config.Storage{}, done(20*gib, nil)},
		{"after a boot, before the configuration", nil, done(20*gib, reboot)},
		{"after a boot with errors recorded", nil, done(20*gib, func(m *model) { m.boot(); m.Disks[0].part(6).Content.Dirty = true })},
		{"another size of STATE than the one made", &config.Storage{StateSize: gib}, done(20*gib, nil)},
		{"the disk grew", &config.Storage{}, done(20*gib, vda(func(d *Disk) { d.Size = 40 * gib; d.Repair = "grew" }))},
		{"the disk grew a little", &config.Storage{}, done(20*gib, vda(func(d *Disk) { d.Size += 8 * mib }))},
		{"the disk grew, and there is no configuration yet", nil, done(20*gib, func(m *model) { m.boot(); m.Disks[0].Size = 40 * gib })},
		{"a partition grew, its file system not", &config.Storage{}, done(20*gib, vda(func(d *Disk) { d.part(6).Content.Size -= gib }))},
		{"power cut before the kernel knew", &config.Storage{}, done(20*gib, func(m *model) { m.boot(); m.Disks[0].part(6).Device = "" })},
		{"power cut before VAR was formatted", &config.Storage{}, done(20*gib, func(m *model) {
			m.boot()
			p := m.Disks[0].part(6)
			p.Attributes, p.Content = unformatted, probe.Result{Kind: "xfs"}
		})},
		{"the same, before the configuration", nil, done(20*gib, func(m *model) { m.boot(); m.Disks[0].part(6).Attributes = unformatted })},
		{"power cut before VAR was added", &config.Storage{}, done(20*gib, func(m *model) { m.boot(); m.Disks[0].Partitions = m.Disks[0].Partitions[:5] })},
		{"STATE's partition is gone, VAR's is not", &config.Storage{Wipe: true}, done(20*gib, func(m *model) {
			m.boot()
			d := &m.Disks[0]
			d.Size, d.Partitions = 40*gib, append(slices.Clone(d.Partitions[:4]), d.Partitions[5])
		})},
		{"STATE lost its file system", &config.Storage{Wipe: true}, done(20*gib, func(m *model) { m.boot(); m.Disks[0].part(5).Content = probe.Result{Kind: "unknown"} })},
		{"STATE was formatted by somebody", nil, done(20*gib, func(m *model) { m.boot(); m.Disks[0].part(5).Content = probe.Result{Kind: "ext4", Label: "x"} })},
		{"a folder changed", &config.Storage{}, done(20*gib, func(m *model) { m.Entries[VarVolume]["lib/etcd"] = skewed })},
		{"a link in place of a folder", &config.Storage{}, done(20*gib, func(m *model) { m.Entries[VarVolume]["lib/etcd"] = another })},
		{"too small", &config.Storage{}, machine(imageDisk("/dev/vda", 2*gib))},
		{"remains of an earlier installation", &config.Storage{}, machine(with(imageDisk("/dev/vda", 20*gib), func(d *Disk) { d.Tail = probe.Result{Kind: "ext4", Label: "BULKHEAD-STATE"} }))},
		{"the same, wipe", &config.Storage{Wipe: true}, machine(with(imageDisk("/dev/vda", 20*gib), func(d *Disk) { d.Tail = probe.Result{Kind: "ext4", Label: "BULKHEAD-STATE"} }))},
		{"no such disk", &config.Storage{Disk: "/dev/sda"}, machine(imageDisk("/dev/vda", 20*gib), otherDisk("/dev/vdb", gib, probe.Result{Kind: "xfs"}))},
		{"no disk", &config.Storage{}, machine()},
		{"no system disk", &config.Storage{}, machine(otherDisk("/dev/vdb", gib, probe.Result{Kind: "empty"}))},
		{"an empty second disk", &config.Storage{Disk: "/dev/vdb"}, machine(imageDisk("/dev/vda", 4*gib), otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "empty"}))},
		{"a second disk with a file system", &config.Storage{Disk: "/dev/vdb"}, machine(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "xfs", Label: "backup"}))},
		{"the same, wipe", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "xfs", Label: "backup"}))},
		{"the same, in use", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(with(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "xfs", Label: "backup"}), func(d *Disk) { d.Busy = true }))},
		{"a second disk with a damaged table, wipe", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(with(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "gpt"}), func(d *Disk) { d.TableError = "checksum" }))},
		{"a second disk with partitions", &config.Storage{Disk: "/dev/vdb"}, machine(foreignTable("/dev/vdb", 10*gib, part(1, "EFI", gpt.EFISystem, mib, gib, "vfat"), part(3, "", linux, gib+mib, gib, "unknown")))},
		{"the same, wipe", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(foreignTable("/dev/vdb", 10*gib, part(1, "EFI", gpt.EFISystem, mib, gib, "vfat"), part(3, "", linux, gib+mib, gib, "unknown")))},
		{"a foreign partition that is called STATE, wipe", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(foreignTable("/dev/vdb", 10*gib, part(1, "STATE", linux, mib, gib, "ext4")))},
		{"a read-only disk", &config.Storage{Disk: "/dev/vdb"}, machine(with(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "empty"}), func(d *Disk) { d.ReadOnly = true }))},
		{"large sectors", &config.Storage{Disk: "/dev/vdb"}, machine(with(otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "empty"}), func(d *Disk) { d.SectorSize = 4096 }))},
		{"an unreadable disk", &config.Storage{Disk: "/dev/vdb", Wipe: true}, machine(with(otherDisk("/dev/vdb", 10*gib, probe.Result{}), func(d *Disk) { d.Unreadable = "input/output error" }))},
		{"volumes on another disk than told", &config.Storage{Disk: "/dev/vdb", Wipe: true}, done(20*gib, func(m *model) {
			m.boot()
			m.Disks = append(m.Disks, otherDisk("/dev/vdb", 10*gib, probe.Result{Kind: "empty"}))
		})},
		{"a disk of another node beside", nil, done(20*gib, func(m *model) {
			m.boot()
			d := m.clone().Disks[0]
			d.Device, d.System = "/dev/vdb", false
			m.Disks = append(m.Disks, d)
			m.boot()
		})},
		{"two disks with volumes, neither the system's", nil, done(20*gib, func(m *model) {
			d := m.clone().Disks[0]
			d.Device = "/dev/vdb"
			m.Disks[0].System, d.System = false, false
			m.Disks = append(m.Disks, d)
			m.boot()
		})},
		{"an unknown file system wanted", &config.Storage{Filesystem: "xfs"}, machine(imageDisk("/dev/vda", 20*gib))},

		{"with a TPM, before the configuration", nil, withTPM(machine(imageDisk("/dev/vda", 20*gib)))},
		{"with a TPM", &auto, withTPM(machine(imageDisk("/dev/vda", 20*gib)))},
		{"with a TPM, encryption none", &config.Storage{Encryption: config.EncryptionNone}, withTPM(machine(imageDisk("/dev/vda", 20*gib)))},
		{"with a TPM, but not a signed image", &auto, func() *model {
			m := withTPM(machine(imageDisk("/dev/vda", 20*gib)))
			m.TPM.Unusable = "there is no signed PCR policy"
			return m
		}()},
		{"luks2 without a TPM", &config.Storage{Encryption: luks2}, machine(imageDisk("/dev/vda", 20*gib))},
		{"luks2, keys", keys(file, service, config.StorageKey{Kind: config.KeyPassphrase}), machine(imageDisk("/dev/vda", 20*gib))},
		{"luks2, keys and the TPM", keys(config.StorageKey{Kind: config.KeyTPM}, service), withTPM(machine(imageDisk("/dev/vda", 20*gib)))},
		{"luks2, wants a TPM that is not there", keys(config.StorageKey{Kind: config.KeyTPM}), machine(imageDisk("/dev/vda", 20*gib))},
		{"encrypted, nothing to do", &auto, crypt(auto, nil)},
		{"encrypted, after a boot", nil, crypt(auto, reboot)},
		{"the same, with the configuration", &auto, crypt(auto, reboot)},
		{"encrypted, power cut before mkfs", &auto, crypt(auto, func(m *model) { m.boot(); p := m.Disks[0].part(5); p.Attributes = unformatted })},
		{"encrypted, storaged restarted before mkfs of VAR", &auto, crypt(auto, func(m *model) {
			m.Mounts = m.Mounts[:1]
			m.Disks[0].part(6).Attributes = unformatted
		})},
		{"encrypted, the TPM did not open it", nil, crypt(auto, func(m *model) {
			m.boot()
			m.TPM.Capped = true
			m.Disks[0].part(5).Why = "tpm: Secure Boot is not as it was: dbx was changed"
		})},
		{"the same, with the configuration, and a disk that grew", &auto, crypt(auto, func(m *model) {
			m.boot()
			m.TPM.Capped = true
			m.Disks[0].part(5).Why = "tpm: Secure Boot is not as it was: dbx was changed"
			m.Disks[0].Size = 40 * gib
		})},
		{"encrypted, the TPM is gone", nil, crypt(auto, func(m *model) { m.boot(); m.TPM = vault.Machine{} })},
		{"encrypted, by a server, capped", nil, crypt(*keys(service), func(m *model) { m.boot(); m.TPM.Capped = true })},
		{"encrypted, unlocked by a person", &auto, crypt(auto, func(m *model) {
			m.boot()
			m.TPM.Capped = true
			if err := m.do(Step{Op: opOpen, Disk: "/dev/vda", Volume: StateVolume, Number: 5}); err == nil {
				t.Fatal("the model opens it")
			}
			m.Disks[0].part(5).Map = Map{"/dev/dm-1", "253:1", 240 * mib, probe.Result{Kind: probe.Ext4, Label: "BULKHEAD-STATE", Size: 240 * mib}}
		})},
		{"encrypted, the disk grew", &auto, crypt(auto, vda(func(d *Disk) { d.Size = 40 * gib; d.Repair = "grew" }))},
		{"encrypted, one copy of a header is damaged", &auto, crypt(auto, vda(func(d *Disk) { d.part(5).LUKS.Repair = "first copy: the checksum is wrong" }))},
		{"the same, before the configuration", nil, crypt(auto, func(m *model) { m.boot(); m.Disks[0].part(5).LUKS.Repair = "first copy: the checksum is wrong" })},
		{"encrypted, the header is damaged", nil, crypt(auto, func(m *model) { m.boot(); m.Disks[0].part(5).LUKS.Unusable = "both checksums are wrong" })},
		{"STATE is encrypted, somebody's VAR is not", nil, crypt(auto, func(m *model) {
			m.boot()
			p := m.Disks[0].part(6)
			p.Content, p.LUKS = probe.Result{Kind: probe.Ext4, Label: "BULKHEAD-VAR"}, vault.Header{}
		})},
		{"STATE is encrypted, VAR opens by something else", nil, crypt(auto, func(m *model) { m.boot(); m.Disks[0].part(6).LUKS.Keys = []vault.Key{{Kind: vault.KeyFile}} })},
		{"encrypted, none wanted", &config.Storage{Encryption: config.EncryptionNone}, crypt(auto, nil)},
		{"not encrypted, luks2 wanted", &config.Storage{Encryption: luks2}, done(20*gib, nil)},
		{"not encrypted, in a machine that has a TPM now", nil, done(20*gib, func(m *model) { m.boot(); withTPM(m) })},
		{"encrypted, another key wanted", keys(service, file), crypt(*keys(service), nil)},
		{"not encrypted, keys wanted", keys(service), done(20*gib, nil)},
	}
	golden(t, "plan.txt", tests)
}

// A situation is one of a golden file.
type situation struct {
	name string
	want *config.Storage // nil: before there is a spec
	m    *model
}

// golden compares what is planned with a file of testdata.
func golden(t *testing.T, file string, tests []situation) {
	t.Helper()
	var out strings.Builder
	for _, tt := range tests {
		before := fmt.Sprint(tt.m.State)
		var steps []Step
		var err error
		if tt.want == nil {
			steps, err = planBare(tt.m.State)
		} else {
			steps, err = plan(*tt.want, tt.m.State)
		}
		if after := fmt.Sprint(tt.m.State); after != before {
			t.Errorf("%s: plan changed what it was given", tt.name)
		}
		fmt.Fprintf(&out, "# %s\n", tt.name)
		folders := 0
		for _, s := range steps {
			if s.Op == opEntry && tt.name != "a new machine" && len(steps) > 3 {
				folders++ // always the same ones
				continue
			}
			fmt.Fprintf(&out, "%s\n", s)
		}
		if folders > 0 {
			fmt.Fprintf(&out, "(%d entries)\n", folders)
		}
		if err != nil {
			fmt.Fprintf(&out, "error: %s\n", err)
		}
		fmt.Fprintln(&out)
	}
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("%s differs; look at what changed after -update. Got:\n%s", file, out.String())
	}
}

func with(d Disk, f func(*Disk)) Disk { f(&d); return d }

// ownContent is what must survive everything: what lies on volumes that were formatted, and on the slots.
func ownContent(s State) (all []string) {
	for _, d := range s.Disks {
		for _, p := range d.Partitions {
			if d.HasTable && !foreign(p.Partition) && p.Attributes&unformatted == 0 {
				c := p.Content
				c.Size, c.Dirty = 0, false
				all = append(all, fmt.Sprint(d.Device, p.Number, p.Name, p.First, c))
			}
		}
	}
	return all
}

func foreignContent(s State) (all []string) {
	for _, d := range s.Disks {
		if !d.HasTable && d.Content.Data() {
			all = append(all, fmt.Sprint(d.Device, d.Content, d.TableError))
		}
		for _, p := range d.Partitions {
			if d.HasTable && foreign(p.Partition) {
				all = append(all, fmt.Sprint(d.Device, p.Number, p.Name, p.First, p.Last, p.Content))
			}
		}
	}
	return all
}

// FuzzPlan: from whatever is found, with a power cut after any step, it converges to the same; nothing foreign is lost without
// wipe, nothing of ours ever.
func FuzzPlan(f *testing.F) {
	f.Add([]byte{}, uint8(0), false)
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, uint8(3), true)
	f.Add([]byte{9, 7, 5, 3, 1, 200, 100, 50, 25, 12, 6, 3, 1}, uint8(7), false)
	testfuzz.Run(f, func(t *testing.T, data []byte, cut uint8, wipe bool) {
		g := &gen{data}
		m := g.machine()
		want := config.Storage{Wipe: wipe, StateSize: config.Size(64+g.n(200)) * mib, Disk: g.pick("system", "/dev/vda", "/dev/vdb", "/dev/sdz")}
		want.Encryption = config.Encryption(g.pick("auto", "none", "luks2", "auto"))
		if want.Encryption == config.EncryptionLUKS2 && g.n(2) == 1 {
			want.Keys = []config.StorageKey{{Kind: config.KeyTPM}}
			if g.n(2) == 1 {
				want.Keys = []config.StorageKey{{Kind: config.KeyFile, Partition: "KEY"}}
			}
		}
		m.TPM.TPM, m.TPM.Owned = g.n(2) == 1, g.n(4) == 1
		m.TPM.Unusable = g.pick("", "", "no policy")
		check := func(m *model, before State, what string) {
			t.Helper()
			have := ownContent(m.State)
			for _, c := range ownContent(before) {
				if !slices.Contains(have, c) {
					t.Fatalf("%s: %s of ours was lost", what, c)
				}
			}
			if wipe {
				return
			}
			if len(m.lost) > 0 {
				t.Fatalf("%s: %v was lost without wipe", what, m.lost)
			}
			if got, want := foreignContent(m.State), foreignContent(before); !slices.Equal(got, want) {
				t.Fatalf("%s: without wipe, foreign data changed from %v to %v", what, want, got)
			}
		}
		start := m.clone()

		through := m.clone()
		err := through.run(t, &want)
		check(through, start.State, "at once")
		if slices.ContainsFunc(start.Disks, func(d Disk) bool { return slices.ContainsFunc(d.Partitions, Partition.encrypted) }) {
			err = through.run(t, &want) // what was locked is seen only now
			check(through, start.State, "at once")
		}
		rest, again := plan(want, through.State)
		if len(rest) > 0 || fmt.Sprint(again) != fmt.Sprint(err) {
			t.Fatalf("does not converge: left %v, error %v, at first %v", rest, again, err)
		}

		steps, _ := plan(want, m.State)
		for i, s := range steps {
			if i == int(cut) {
				break
			}
			if e := m.do(s); e != nil {
				t.Fatalf("%s: %v", s, e)
			}
		}
		m.boot()
		check(m, start.State, "after the cut")
		middle := m.clone().State
		m.run(t, nil)
		check(m, middle, "mounting after the cut")
		m.run(t, &want)
		check(m, middle, "going on after the cut")
		through.boot()
		through.run(t, &want)
		if got, want := fmt.Sprint(m.Disks), fmt.Sprint(through.Disks); got != want && err == nil {
			t.Fatalf("after a cut at %d it ends otherwise:\n%s\nthan at once:\n%s", cut, got, want)
		}
	})
}

// gen makes machines out of bytes.
type gen struct{ b []byte }

func (g *gen) n(below int) int {
	if len(g.b) == 0 {
		return 0
	}
	v := int(g.b[0])
	g.b = g.b[1:]
	return v % below
}

func (g *gen) pick(of ...string) string { return of[g.n(len(of))] }

func (g *gen) content() probe.Result {
	r := probe.Result{Kind: probe.Kind(g.pick("empty", "unknown", "ext4", "xfs", "luks", "mbr")), Label: g.pick("", "BULKHEAD-STATE", "BULKHEAD-VAR", "data")}
	if r.Kind == probe.Empty {
		r.Label = ""
	}
	r.Dirty = r.Kind == probe.Ext4 && g.n(4) == 1
	return r
}

// header is that of an encrypted partition.
func (g *gen) header(v VolumeName) vault.Header {
	h := vault.Header{UUID: "u", Offset: 16 * mib, Keys: []vault.Key{{Kind: vault.Recovery}}, Repair: g.pick("", "", "first copy"), Unusable: g.pick("", "", "", "damaged")}
	if k := vault.Kind(g.pick("tpm", "keyFile", "state", "passphrase")); g.n(4) != 3 {
		h.Keys = append(h.Keys, vault.Key{Slot: 1, Kind: k})
	}
	return h
}

func (g *gen) machine() *model {
	disks := []Disk{g.disk("/dev/vda")}
	disks[0].System = g.n(4) != 3 && disks[0].HasTable
	if g.n(2) == 1 {
		disks = append(disks, g.disk("/dev/vdb"))
	}
	return machine(disks...)
}

func (g *gen) disk(device string) Disk {
	d := imageDisk(device, int64(1+g.n(12))*gib+int64(g.n(64))*mib)
	d.System = false
	switch g.n(4) {
	case 0:
		d = otherDisk(device, d.Size, g.content())
		d.Busy = g.n(8) == 1
		return d
	case 1:
		d.Partitions = nil
	}
	if g.n(2) == 0 {
		d.Repair = ""
	}
	for i := g.n(4); i > 0; i-- {
		start, room := free(d.table(), d.Size)
		size := min(room, int64(1+g.n(32))*128*mib)
		if size < 64*mib {
			break
		}
		v := volumes[g.n(2)]
		p := part(nextNumber(d.Partitions)+g.n(2), string(v.name), v.typ, start, size, "")
		p.Content = g.content()
		switch g.n(4) {
		case 0:
			p.Type = gpt.LinuxGeneric
		case 1:
			p.Name = "data"
			p.Busy = g.n(8) == 1
		case 2:
			p.Attributes = unformatted
		default:
			p.Content.Size = size - 3*mib
			if g.n(2) == 0 {
				p.Content = probe.Result{Kind: probe.Ext4, Label: v.label, Size: size - 3*mib}
			}
		}
		if p.encrypted() {
			p.Content.Label, p.LUKS = "", g.header(v.name)
		}
		if _, twice := d.volume(v); twice && v.owns(p.Partition) {
			continue
		}
		d.Partitions = append(d.Partitions, p)
	}
	if g.n(4) == 1 {
		d.Tail = g.content()
	}
	return d
}
