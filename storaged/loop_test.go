package storaged

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// isolate puts the test's thread into mount and network namespaces of its own, from which nothing leaks to the host. The thread
// is never given back, so both end with the test.
func isolate(t *testing.T) {
	t.Helper()
	skip := t.Skipf
	if os.Getenv("REQUIRE_ROOT") == "1" {
		skip = t.Fatalf
	}
	if os.Getuid() != 0 {
		skip("not root: loop devices and mounts are not tested")
	}
	for _, tool := range []string{"mkfs.ext4", "e2fsck"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip("no %s: volumes are not tested", tool)
		}
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		skip("unshare: %v: volumes are not tested", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
}

// A bench is a disk in a file, behind a loop device, and the kernel layer that sees only it.
type bench struct {
	*linux
	t    *testing.T
	file string
	loop *os.File
}

// newBench attaches a disk of size bytes that carries the image's partitions, as the image was before the disk grew.
func newBench(t *testing.T, size int64, table bool) *bench {
	t.Helper()
	b := &bench{t: t, file: filepath.Join(t.TempDir(), "disk")}
	f, err := os.Create(b.file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const image = 5*mib + 64<<10 // it ends where its last partition does, so that its backup table is where STATE goes
	if table {
		tab := gpt.Table{DiskGUID: newGUID()}
		for i, n := range []string{"ROOT-A", "VERITY-A", "ROOT-B", "VERITY-B"} {
			p := part(i+1, n, gpt.Root, int64(i+1)*mib, mib, "")
			p.GUID = newGUID()
			tab.Partitions = append(tab.Partitions, p.Partition)
		}
		if err := errors.Join(f.Truncate(image), tab.WriteTo(f, image)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	b.linux = newLinux(slog.New(slog.DiscardHandler), noVault(t.TempDir()))
	b.runtime, b.vars = t.TempDir(), t.TempDir() // never this host's firmware
	b.root = root
	for _, v := range volumes {
		if err := os.Mkdir(root+v.target, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b.attach()
	t.Cleanup(b.detach)
	return b
}

// attach makes the disk appear as at boot: the kernel reads the table.
func (b *bench) attach() {
	b.t.Helper()
	f, err := os.OpenFile(b.file, os.O_RDWR, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer ctl.Close()
	for range 20 { // others use loop devices too
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			b.t.Fatal(err)
		}
		name := fmt.Sprintf("loop%d", n)
		loop, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		cfg := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_PARTSCAN}}
		if err := unix.IoctlLoopConfigure(int(loop.Fd()), &cfg); err != nil {
			loop.Close()
			continue
		}
		b.loop = loop
		b.include = func(s string) bool { return s == name }
		b.rootDev = func() string { return attr(b.block(name), "dev") }
		b.scan(name)
		return
	}
	b.t.Fatal("no free loop device")
}

// scan tells the kernel what it would have found itself if it were built with CONFIG_EFI_PARTITION.
func (b *bench) scan(name string) {
	n, err := size(b.loop)
	if err != nil {
		b.t.Fatal(err)
	}
	table, _, err := gpt.Read(b.loop, n)
	if err != nil || len(b.partitions(name, nil)) > 0 {
		return // none, or it did so
	}
	for _, p := range table.Partitions {
		if err := blkpg(b.loop, unix.BLKPG_ADD_PARTITION, p.Number, p.Start(), p.Size()); err != nil {
			b.t.Fatal(err)
		}
	}
}

// detach unmounts all and takes the disk away, as a restart of the machine does. The kernel forgets its partitions.
func (b *bench) detach() {
	b.t.Helper()
	if b.loop == nil {
		return
	}
	for _, v := range volumes {
		for {
			if err := unix.Unmount(b.root+v.target, 0); err == unix.EBUSY {
				b.t.Errorf("%s is busy: a file on it is open", v.target)
				_ = unix.Unmount(b.root+v.target, unix.MNT_DETACH)
			} else if err != nil {
				break
			}
		}
	}
	name := filepath.Base(b.loop.Name())
	if err := unix.IoctlSetInt(int(b.loop.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
		b.t.Errorf("detach: %v", err)
	}
	b.loop.Close()
	b.loop = nil
	if left := b.partitions(name, nil); len(left) > 0 {
		b.t.Errorf("%s still has %d partitions", name, len(left))
	}
}

func (b *bench) reboot() { b.detach(); b.attach() }

// resize makes the disk larger while it is in use.
func (b *bench) resize(size int64) {
	b.t.Helper()
	if err := os.Truncate(b.file, size); err != nil {
		b.t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(b.loop.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) read() State {
	b.t.Helper()
	s, err := b.Read(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// round does what is planned; want nil: without a spec.
func (b *bench) round(want *config.Storage) []error {
	b.t.Helper()
	steps, err := planFor(want, b.read())
	var errs []error
	if err != nil {
		errs = append(errs, err)
	}
	for _, s := range steps {
		if err := b.Do(b.t.Context(), s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s, err))
		}
	}
	return errs
}

func planFor(want *config.Storage, have State) ([]Step, error) {
	if want == nil {
		return planBare(have)
	}
	return plan(*want, have)
}

// converge does one round and wants nothing to be left.
func (b *bench) converge(want *config.Storage) {
	b.t.Helper()
	for _, err := range b.round(want) {
		b.t.Fatal(err)
	}
	if rest, err := planFor(want, b.read()); err != nil || len(rest) > 0 {
		b.t.Fatalf("left: %v, %v", rest, err)
	}
}

func (b *bench) tool(argv ...string) string {
	b.t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		b.t.Errorf("%v: %v: %s", argv, err, out)
	}
	return string(out)
}

func (b *bench) device(number int) string { return node(b.loop.Name(), number) }

// TestVolumes lives a disk's life: made, restarted, used, grown.
func TestVolumes(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, true)
	want := &config.Storage{Disk: "system", StateSize: 64 * mib}
	if errs := b.round(nil); len(errs) > 0 {
		t.Fatal(errs)
	}
	if d := b.read().Disks[0]; len(d.Partitions) != 4 || d.Repair == "" || !d.System {
		t.Fatalf("without a spec something was written: %+v", d)
	}
	b.converge(want)
	b.checkMounts()
	for path, owner := range map[string][2]uint32{
		"/state": {0, 0o755}, "/var": {0, 0o755}, "/state/machined": {101, 0o700}, "/state/trustd": {105, 0o700}, "/var/lib/etcd": {109, 0o700},
		"/var/tmp": {0, 0o1777}, "/var/log/kubernetes/audit": {120, 0o700}, "/var/lib": {0, 0o755}, "/var/.mounted": {0, 0o444},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(b.root+path, &st); err != nil || st.Uid != owner[0] || st.Gid != owner[0] || st.Mode&0o7777 != owner[1] {
			t.Errorf("%s: owner %d:%d mode %o, %v; want %d and %o", path, st.Uid, st.Gid, st.Mode&0o7777, err, owner[0], owner[1])
		}
	}
	if to, err := os.Readlink(b.root + "/var/run"); to != "/run" {
		t.Errorf("/var/run: %q, %v", to, err)
	}
	if err := os.WriteFile(b.root+"/state/machined/generation", []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}

	b.reboot()
	b.converge(nil)
	b.checkMounts()
	if _, err := os.Stat(b.root + "/state/machined/generation"); err != nil {
		t.Error(err)
	}

	b.grow(want)
	if h := b.read().Disks[0].Repair; h != "" {
		t.Error(h)
	}
	state, vari := b.device(5), b.device(6)
	b.detachMounts()
	b.tool("e2fsck", "-f", "-n", state)
	b.tool("e2fsck", "-f", "-n", vari)
	if _, err := exec.LookPath("sgdisk"); err == nil {
		if out := b.tool("sgdisk", "-v", b.file); !strings.Contains(out, "No problems found") {
			t.Error(out)
		}
	}
}

// grow makes the disk larger under mounted volumes.
func (b *bench) grow(want *config.Storage) {
	b.t.Helper()
	before := b.read()
	b.resize(5 * gib)
	if mayResize := effective()&unit.Capability("SYS_RESOURCE") != 0; mayResize {
		b.converge(want)
		if was, is := before.Volumes[VarVolume].Size, b.read().Volumes[VarVolume].Size; is < was+2*gib-100*mib {
			b.t.Errorf("VAR was %d bytes, after the disk grew by 2 GiB it is %d", was, is)
		}
	} else {
		b.t.Log("PARTLY SKIPPED: root has no CAP_SYS_RESOURCE here, so no file system grows online")
		if errs := b.round(want); len(errs) != 1 || !strings.Contains(errs[0].Error(), "EXT4_IOC_RESIZE_FS") {
			b.t.Errorf("got %v", errs)
		}
	}
	if was, is := before.Disks[0].part(6), b.read().Disks[0].part(6); is.Size() != was.Size()+2*gib || is.KernelSize != is.Size() {
		b.t.Errorf("partition was %s, is %s, for the kernel %s", sizeText(was.Size()), sizeText(is.Size()), sizeText(is.KernelSize))
	}
}

// effective returns the capabilities of this thread.
func effective() uint64 {
	var data [2]unix.CapUserData
	if unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]) != nil {
		return 0
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective)
}

func (b *bench) detachMounts() {
	for _, v := range volumes {
		if err := unix.Unmount(b.root+v.target, 0); err != nil {
			b.t.Error(err)
		}
	}
}

func (b *bench) checkMounts() {
	b.t.Helper()
	s := b.read()
	for _, v := range volumes {
		m, ok := s.mounted(v.target)
		if !ok || !strings.HasPrefix(m.Options, "rw,"+v.options) || m.Filesystem != "ext4" {
			b.t.Errorf("%s: %+v", v.target, m)
		}
	}
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		b.t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(b.root+"/var", &st); err != nil {
		b.t.Fatal(err)
	}
	if own := fmt.Sprintf("resuid=%d", uid.Etcdd); !strings.Contains(string(text), own) || (st.Bfree-st.Bavail)*100 < st.Blocks {
		b.t.Errorf("of %d blocks %d are reserved; want more than 1 %% for etcd, and %s among the mounts:\n%s", st.Blocks, st.Bfree-st.Bavail, own, text)
	}
}

// TestPowerCut cuts after every step that writes to the disk, and in the middle of mkfs.
func TestPowerCut(t *testing.T) {
	isolate(t)
	want := &config.Storage{StateSize: 64 * mib}
	for cut := range 10 {
		b := newBench(t, 2*gib+200*mib, true)
		steps, err := plan(*want, b.read())
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, s := range steps {
			if s.Op == opEntry {
				continue
			}
			if n++; n > cut {
				if s.Op == opMkfs { // the file system is there, the mark not yet gone
					b.tool("mkfs.ext4", "-q", "-F", "-L", volumeNamed(s.Volume).label, s.Device)
				}
				break
			}
			if err := b.Do(t.Context(), s); err != nil {
				t.Fatal(err)
			}
		}
		b.reboot()
		if errs := b.round(nil); len(errs) > 0 {
			t.Errorf("cut at %d: %v", cut, errs)
		}
		b.converge(want)
		b.checkMounts()
		b.detach()
	}
}

// TestRefuse asks the kernel layer for what the planner never would, or would not any more.
func TestRefuse(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, true)
	want := &config.Storage{StateSize: 64 * mib}
	steps, err := plan(*want, b.read())
	if err != nil {
		t.Fatal(err)
	}
	find := func(op Op, v VolumeName) Step {
		for _, s := range steps {
			if s.Op == op && s.Volume == v {
				return s
			}
		}
		t.Fatalf("no %s %s in %v", op, v, steps)
		return Step{}
	}
	refused := func(what string, s Step, text string) {
		t.Helper()
		before := b.tool("sha256sum", b.device(1), b.device(2))
		err := b.Do(t.Context(), s)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %s: got %v, want …%s…", what, s, err, text)
		}
		if after := b.tool("sha256sum", b.device(1), b.device(2)); after != before {
			t.Errorf("%s: a slot changed", what)
		}
	}
	other := func(s Step, f func(*Step)) Step { f(&s); return s }
	add := find(opAdd, StateVolume)
	refused("no partition yet", find(opMkfs, StateVolume), "skipped")
	refused("no partition yet", find(opTell, StateVolume), "skipped")
	refused("over a slot", other(add, func(s *Step) { s.Start = mib }), "")
	for _, number := range []int{1, 2} {
		refused("a slot", Step{Op: opRemove, Disk: add.Disk, Number: number, Start: int64(number) * mib, Size: mib, Wipe: true}, "another one meanwhile")
		refused("a slot", other(find(opMkfs, StateVolume), func(s *Step) { s.Number, s.Start, s.Device = number, mib, b.device(number) }), "skipped")
	}
	refused("a table is there", Step{Op: opCreate, Disk: add.Disk, Wipe: true, Over: "gpt"}, "table meanwhile")

	put := func(text string) {
		t.Helper()
		if _, err := b.loop.WriteAt([]byte(text), add.Start); err != nil {
			t.Fatal(err)
		}
	}
	put("XFSB")
	refused("data came after the plan", add, "found xfs")
	if _, err := plan(*want, b.read()); err == nil || !strings.Contains(err.Error(), "xfs") {
		t.Errorf("plan: %v", err)
	}
	put("\x00\x00\x00\x00")

	b.converge(want)
	if err := os.WriteFile(b.root+"/state/machined/x", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.Do(t.Context(), find(opMkfs, StateVolume)); err != nil {
		t.Errorf("a done mkfs: %v", err)
	}
	b.detachMounts()
	if err := b.Do(t.Context(), find(opMkfs, StateVolume)); err != nil {
		t.Errorf("a done mkfs: %v", err)
	}
	b.converge(nil)
	if _, err := os.Stat(b.root + "/state/machined/x"); err != nil {
		t.Errorf("STATE was formatted again: %v", err)
	}
}

// TestForeignDisk goes from refusal to wipe on a disk without a table.
func TestForeignDisk(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, false)
	b.rootDev = func() string { return "" }
	b.tool("mkfs.ext4", "-q", "-F", "-L", "backup", b.loop.Name())
	want := &config.Storage{Disk: b.loop.Name()}
	errs := b.round(want)
	if len(errs) != 1 || !strings.Contains(errs[0].Error(), `holds ext4 "backup", which would be lost; set Storage.wipe`) {
		t.Errorf("got %v", errs)
	}
	if r := b.read().Disks[0].Content; r.Label != "backup" {
		t.Errorf("after the refusal: %v", r)
	}
	want.Wipe = true
	mnt := t.TempDir()
	if err := unix.Mount(b.loop.Name(), mnt, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if errs := b.round(want); len(errs) != 1 || !strings.Contains(errs[0].Error(), "in use") {
		t.Errorf("mounted: got %v", errs)
	}
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	b.converge(want)
	b.checkMounts()
}

// TestLinks puts symbolic links where folders must be, as somebody who is root in a pod can.
func TestLinks(t *testing.T) {
	isolate(t)
	b := newBench(t, 3*gib, true)
	want := &config.Storage{StateSize: 64 * mib}
	b.converge(want)
	vari := b.root + "/var"
	if err := errors.Join(os.Remove(vari+"/lib/etcd"), os.Symlink("/etc", vari+"/lib/etcd"),
		os.RemoveAll(vari+"/log"), os.Symlink("../state/trustd", vari+"/log")); err != nil {
		t.Fatal(err)
	}
	errs := fmt.Sprint(b.round(want))
	for _, at := range []string{"/var/lib/etcd", "/var/log:", "/var/log/pods"} {
		if !strings.Contains(errs, at) {
			t.Errorf("%s is not named in %s", at, errs)
		}
	}
	if all, err := os.ReadDir(b.root + "/state/trustd"); err != nil || len(all) > 0 {
		t.Errorf("a link was followed: %v, %v", all, err)
	}
	s := Step{Op: opEntry, Volume: VarVolume, Disk: b.loop.Name(), Device: b.device(6), Number: 6}
	p := *b.read().Disks[0].part(6)
	s.Start, s.Size = p.Start(), p.Size()
	s.Entry = entry{volume: VarVolume, path: "log/pods", mode: 0o755}
	if err := b.Do(t.Context(), s); err == nil {
		t.Error("a folder was made behind a link")
	}
	if err := errors.Join(os.Remove(vari+"/lib/etcd"), os.Remove(vari+"/log")); err != nil {
		t.Fatal(err)
	}
	b.converge(want)
	if err := os.Chmod(vari+"/lib/etcd", 0o777); err != nil {
		t.Fatal(err)
	}
	b.converge(want)
	if st, err := os.Stat(vari + "/lib/etcd"); err != nil || st.Mode().Perm() != 0o700 || st.Sys().(*syscall.Stat_t).Uid != 109 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// TestWatch wants an event in an empty network namespace, like the one that storaged runs in.
func TestWatch(t *testing.T) {
	isolate(t)
	b := newBench(t, 64*mib, false)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	woken, ended := false, make(chan struct{})
	go func() { // the disk grows until somebody sees it: the watch may not stand yet
		defer close(ended)
		for size := int64(65); ctx.Err() == nil; size++ {
			b.resize(size * mib)
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	err := b.Watch(ctx, func() { woken = true; cancel() })
	<-ended
	if !woken || !errors.Is(err, context.Canceled) {
		t.Errorf("woken: %v, %v", woken, err)
	}
}
