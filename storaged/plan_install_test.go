package storaged

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// isoDisk is an installation medium: no second slot, no room.
func isoDisk(device string) Disk {
	return Disk{
		Device: device, Size: 70 * mib, SectorSize: 512, ReadOnly: true, System: true, HasTable: true, Transport: "virtio", Content: probe.Result{Kind: probe.GPT}, Tail: probe.Result{Kind: probe.Empty},
		Partitions: []Partition{part(1, "ESP", gpt.EFISystem, mib, 40*mib, "vfat"), part(2, "ROOT-A", gpt.Root, 41*mib, 26*mib, "squashfs"), part(3, "VERITY-A", gpt.RootVerity, 67*mib, mib, "verity")},
	}
}

// laidDisk has the partitions of the system, whole.
func laidDisk(device string, size int64) Disk {
	d := Disk{Device: device, Size: size, SectorSize: 512, HasTable: true, Content: probe.Result{Kind: probe.GPT}, Tail: probe.Result{Kind: probe.Empty}}
	for _, p := range layout.Partitions(func(string) gpt.GUID { return gpt.GUID{} }) {
		d.Partitions = append(d.Partitions, Partition{Partition: p})
	}
	return d
}

func emptyDisk(device string, size int64, f func(*Disk)) Disk {
	d := otherDisk(device, size, probe.Result{Kind: probe.Empty})
	if f != nil {
		f(&d)
	}
	return d
}

// selects is a document with only a selector.
func selects(s config.DiskSelector) *config.Storage {
	return &config.Storage{Disk: "system", Install: config.Install{Disk: s}}
}

// TestPlanInstall writes down what an installation does, and what it refuses: read testdata/install.txt.
func TestPlanInstall(t *testing.T) {
	large := selects(config.DiskSelector{Size: ">= 10GiB"})
	wipe := *large
	wipe.Wipe = true
	sda := func(d *Disk) { d.Model, d.Serial, d.Transport, d.WWN = "Samsung SSD 870", "S1", "sata", "naa.5001" }
	nvme := func(d *Disk) { d.Model, d.Serial, d.Transport, d.WWN = "Samsung SSD 980", "S2", "nvme", "eui.01" }
	two := func() *model {
		return machine(isoDisk("/dev/vda"), emptyDisk("/dev/sda", 20*gib, sda), emptyDisk("/dev/nvme0n1", 40*gib, nvme))
	}
	one := func() *model { return machine(isoDisk("/dev/vda"), emptyDisk("/dev/vdb", 20*gib, nil)) }
	over := func(d Disk) *model { return machine(isoDisk("/dev/vda"), d) }
	until := func(op Op, then func(*model)) *model { // done up to a step, and the power cut
		m := one()
		steps, err := plan(*large, m.State)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps {
			if s.Op == op {
				break
			}
			if err := m.do(s); err != nil {
				t.Fatal(err)
			}
		}
		if then != nil {
			then(m)
		}
		return m
	}
	runsFrom := func(device string) func(*model) {
		return func(m *model) {
			m.boot()
			for i := range m.Disks {
				m.Disks[i].System = m.Disks[i].Device == device
			}
		}
	}
	golden(t, "install.txt", []situation{
		{"to an empty disk", large, one()},
		{"with a TPM", large, func() *model { m := one(); m.TPM = vault.Machine{TPM: true, ImageEpoch: 1}; return m }()},
		{"before the configuration", nil, one()},
		{"power cut after the partitions", large, until(opAdd, (*model).boot)},
		{"power cut before the root was copied", large, until(opRoot, (*model).boot)},
		{"the same, before the configuration", nil, until(opRoot, (*model).boot)},
		{"power cut before the boot files were copied", large, until(opBoot, (*model).boot)},
		{"the same, and names have changed", selects(config.DiskSelector{Device: "/dev/sdz"}), until(opBoot, (*model).boot)},
		{"the kernel does not know all partitions", large, until(opRoot, func(m *model) { m.boot(); m.disk("/dev/vdb").part(3).Device = "" })},
		{"all is copied", large, until("", nil)},
		{"started from the medium again", large, until("", (*model).boot)},
		{"started from the disk", large, until("", runsFrom("/dev/vdb"))},
		{"started from the disk, power cut before the mark was gone", large, until(opBoot, func(m *model) {
			runsFrom("/dev/vdb")(m)
			m.disk("/dev/vdb").part(2).Attributes = 0
		})},
		{"started from the disk, and names have changed", selects(config.DiskSelector{Device: "/dev/vda"}), until("", runsFrom("/dev/vdb"))},
		{"started from the disk, which grew", large, until("", func(m *model) { runsFrom("/dev/vdb")(m); m.disk("/dev/vdb").Size = 40 * gib })},
		{"another disk than the one with STATE is meant", selects(config.DiskSelector{Serial: "S2"}), func() *model {
			m := until("", runsFrom("/dev/vdb"))
			m.Disks = append(m.Disks, emptyDisk("/dev/nvme0n1", 40*gib, nvme))
			return m
		}()},
		{"no disk is chosen", &config.Storage{Disk: "system"}, two()},
		{"two disks match", large, two()},
		{"two disks, one by its serial", selects(config.DiskSelector{Serial: "S2"}), two()},
		{"two disks, one by its model", selects(config.DiskSelector{Model: "*870"}), two()},
		{"two disks, one by its size", selects(config.DiskSelector{Size: "> 1GiB, < 30GiB"}), two()},
		{"two disks, one by what attaches it, and its wwn", selects(config.DiskSelector{Transport: "nvme", WWN: "eui.*"}), two()},
		{"no disk matches", selects(config.DiskSelector{Model: "WDC*", Transport: "usb"}), two()},
		{"there is no other disk", large, machine(isoDisk("/dev/vda"))},
		{"the medium is meant", selects(config.DiskSelector{Transport: "virtio"}), one()},
		{"a stick that was started from is meant", selects(config.DiskSelector{Transport: "usb"}), machine(with(laidDisk("/dev/sda", 16*gib), func(d *Disk) {
			d.System, d.Removable, d.Transport = true, true, "usb"
		}), emptyDisk("/dev/sdb", 20*gib, nil))},
		{"the disk that runs is meant", large, machine(with(laidDisk("/dev/vda", 20*gib), func(d *Disk) { d.System = true }))},
		{"a disk with a file system", large, over(otherDisk("/dev/vdb", 20*gib, probe.Result{Kind: "xfs", Label: "backup"}))},
		{"the same, wipe", &wipe, over(otherDisk("/dev/vdb", 20*gib, probe.Result{Kind: "xfs", Label: "backup"}))},
		{"a disk with partitions", large, over(foreignTable("/dev/vdb", 20*gib, part(1, "EFI", gpt.EFISystem, mib, gib, "vfat")))},
		{"the same, wipe", &wipe, over(foreignTable("/dev/vdb", 20*gib, part(1, "EFI", gpt.EFISystem, mib, gib, "vfat")))},
		{"a disk with a damaged table, wipe", &wipe, over(with(otherDisk("/dev/vdb", 20*gib, probe.Result{Kind: "gpt"}), func(d *Disk) { d.TableError = "checksum" }))},
		{"a disk in use, wipe", &wipe, over(with(otherDisk("/dev/vdb", 20*gib, probe.Result{Kind: "xfs"}), func(d *Disk) { d.Busy = true }))},
		{"a disk with partitions of another layout, wipe", &wipe, over(with(imageDisk("/dev/vdb", 20*gib), func(d *Disk) { d.System = false }))},
		{"a disk that is too small", selects(config.DiskSelector{Device: "/dev/vdb"}), over(emptyDisk("/dev/vdb", 2*gib, nil))},
		{"a disk that is much too small", selects(config.DiskSelector{Device: "/dev/vdb"}), over(emptyDisk("/dev/vdb", 512*mib, nil))},
		{"a read-only disk", large, over(emptyDisk("/dev/vdb", 20*gib, func(d *Disk) { d.ReadOnly = true }))},
		{"large sectors", large, over(emptyDisk("/dev/vdb", 20*gib, func(d *Disk) { d.SectorSize = 4096 }))},
		{"not started by UEFI", large, func() *model { m := one(); m.Install.NoBoot = "this machine was not started by UEFI"; return m }()},
		{"STATE on a disk without the system", large, func() *model {
			m := machine(with(imageDisk("/dev/vda", 4*gib), func(d *Disk) { d.Removable = true }), emptyDisk("/dev/vdb", 20*gib, nil))
			if err := m.run(t, &config.Storage{Disk: "/dev/vdb"}); err != nil {
				t.Fatal(err)
			}
			m.boot()
			return m
		}()},
	})
}

// TestInstalled goes through what people see of an installation: the word, the condition, the restart.
func TestInstalled(t *testing.T) {
	m := machine(isoDisk("/dev/vda"), emptyDisk("/dev/vdb", 20*gib, nil))
	want := selects(config.DiskSelector{Device: "/dev/vdb"})
	steps, err := plan(*want, m.State)
	if err != nil {
		t.Fatal(err)
	}
	see := func(when, word, condition string, restarts bool) {
		t.Helper()
		got, found := installStatus(m.State), ""
		for _, c := range conditions(m.State) {
			if c.GetName() == "install" {
				found = c.GetTrouble()
			}
		}
		if got.GetState() != word || !strings.Contains(found, condition) || (condition == "") != (found == "") || (restart(m.State) != "") != restarts {
			t.Errorf("%s: %v, condition %q, restart %q", when, got, found, restart(m.State))
		}
	}
	see("before", "", "", false)
	for _, s := range steps {
		if s.Op == opBoot {
			m.Install.Progress = Progress{Step: "copy the boot files", Disk: "/dev/vdb", Done: 25, Total: 100, Since: time.Unix(10, 0), At: time.Unix(15, 0)}
			see("while it copies", "copying", "", false)
			if i := installStatus(m.State); i.GetDoneBytes() != 25 || i.GetTotalBytes() != 100 || i.GetElapsedSeconds() != 5 || i.GetExpectedSeconds() != 20 {
				t.Errorf("progress %v", i)
			}
		}
		if err := m.do(s); err != nil {
			t.Fatal(err)
		}
	}
	m.Install.Recovery = true
	see("nobody has the recovery key", "waiting", "bhctl storage keys recovery", false)
	m.Install.Recovery = false
	see("all is done", "restarting", "", true)
	m.boot()
	see("the medium again", "medium", "put /dev/vdb first", false)
	m.Disks[0].System, m.Disks[1].System = false, true
	see("from the disk", "running", "", false)
}

func TestLike(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"", "x", true}, {"x", "x", true}, {"x", "xy", false}, {"x*", "xy", true}, {"*y", "xy", true}, {"x*y", "xy", true}, {"x*x", "x", false}, {"*", "", true},
		{"a*b*c", "a1b2c", true}, {"a*b*c", "acb", false}, {"*b*", "abc", true}, {"**", "abc", true}, {"Samsung*", "", false},
	} {
		if got := like(c.pattern, c.text); got != c.want {
			t.Errorf("like(%q, %q) = %v", c.pattern, c.text, got)
		}
	}
}

// FuzzInstall: with a power cut after any step, and whatever starts then, the installation ends as it would have at once; what was not allowed
// to be lost is not, and a disk is only ever bootable with the root on it (the model refuses).
func FuzzInstall(f *testing.F) {
	f.Add(uint8(3), uint8(0), true, false)
	f.Add(uint8(40), uint8(1), false, true)
	testfuzz.Run(f, func(t *testing.T, cut, content uint8, wipe, tpm bool) {
		kinds := []probe.Kind{probe.Empty, probe.MBR, "xfs", probe.Unknown}
		m := machine(isoDisk("/dev/vda"), otherDisk("/dev/vdb", 20*gib, probe.Result{Kind: kinds[int(content)%len(kinds)]}))
		m.TPM.TPM = tpm
		want := selects(config.DiskSelector{Device: "/dev/vdb"})
		want.Wipe = wipe
		once := m.clone()
		err := once.run(t, want)
		if rest, again := plan(*want, once.State); len(rest) > 0 || fmt.Sprint(again) != fmt.Sprint(err) {
			t.Fatalf("does not converge: left %v, error %v, at first %v", rest, again, err)
		}
		if !wipe && len(once.lost) > 0 || err == nil && !once.disk("/dev/vdb").bootable() {
			t.Fatalf("lost %v, error %v: %+v", once.lost, err, once.disk("/dev/vdb"))
		}
		steps, _ := plan(*want, m.State)
		for _, s := range steps[:min(int(cut), len(steps))] {
			if e := m.do(s); e != nil {
				t.Fatalf("%s: %v", s, e)
			}
		}
		if where, _ := m.installed(); where == installRestarting && int(cut) < slices.IndexFunc(steps, func(s Step) bool { return s.Op == opBoot }) {
			t.Error("it restarts before all is there")
		}
		m.boot()
		if why := restart(m.State); why != "" {
			t.Errorf("a boot that has done nothing asks for a restart: %s", why)
		}
		m.run(t, nil)
		m.run(t, want)
		once.boot()
		once.run(t, want)
		if got, want := fmt.Sprint(m.Disks), fmt.Sprint(once.Disks); got != want && err == nil {
			t.Fatalf("after a cut at %d it ends otherwise:\n%s\nthan at once:\n%s", cut, got, want)
		}
	})
}
