package storaged

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// What runs in TestVMCrypt's guest. PID 1 makes the machine usable, starts the phase as the unit's user, looks as root at what it left, and
// restarts. Whatever is not as it must be is a line TEST WRONG.

// phaseKey names the variable that makes the program do a phase.
const phaseKey = "STORAGED_TEST_PHASE"

func wrong(format string, args ...any) { fmt.Printf("TEST WRONG "+format+"\n", args...) }

// must ends the phase.
func must(what string, err error) {
	if err != nil {
		wrong("%s: %v", what, err)
		panic(err)
	}
}

func word(name string) string {
	for _, w := range strings.Fields(attrLong("/proc/cmdline")) {
		if v, ok := strings.CutPrefix(w, name+"="); ok {
			return v
		}
	}
	return ""
}

// guestInit is PID 1 of the guest. It does not return.
func guestInit() {
	defer func() {
		if r := recover(); r != nil {
			fmt.Println("TEST WRONG panic", r)
		}
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}()
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"securityfs", "/sys/kernel/security"}} {
		must("mount "+m[1], unix.Mount(m[0], m[1], m[0], 0, ""))
	}
	if fd, err := unix.Open("/dev/console", unix.O_RDWR, 0); err == nil {
		for i := range 3 {
			_ = unix.Dup3(fd, i, 0)
		}
	}
	must("PATH", os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
	list, err := os.ReadFile("/m/list")
	must("modules", err)
	for _, path := range strings.Fields(string(list)) {
		f, err := os.Open(path)
		must(path, err)
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			wrong("module %s: %v", path, err)
		}
		f.Close()
	}
	for _, dir := range []string{"/run/bulkhead", "/run/bulkhead/boot", "/run/bulkhead/storaged"} {
		must(dir, os.Mkdir(dir, 0o755))
	}
	must("chown", os.Chown("/run/bulkhead/storaged", 106, 106))
	for _, name := range []string{"tpm2-pcr-signature.json", "tpm2-pcr-public-key.pem"} {
		b, err := os.ReadFile("/extra/" + name)
		must(name, err)
		must(name, os.WriteFile("/run/bulkhead/boot/"+name, b, 0o444))
	}
	phase := word("test.phase")
	out := asUnit(phase)
	if phase == "make" {
		oracle(between(out, "RECOVERY ", "\n"))
	}
	fmt.Println("TEST DONE", phase)
}

// asUnit does a phase as storaged's user with storaged's capabilities, and returns what it printed.
func asUnit(phase string) string {
	data, err := os.ReadFile("/unit.json")
	must("unit", err)
	u, err := unitfile.Parse(data)
	must("unit", err)
	cmd := exec.Command("/init")
	cmd.Env = append(u.Env, phaseKey+"="+phase, "PATH="+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.UID}}
	for bit := range 64 {
		if u.Capabilities&(1<<bit) != 0 {
			cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, uintptr(bit))
		}
	}
	out, err := cmd.CombinedOutput()
	fmt.Printf("%s", out)
	if err != nil {
		wrong("phase %s: %v", phase, err)
	}
	return string(out)
}

// A guest is the kernel layer as a node has it.
type guest struct {
	*linux
	ctx context.Context
}

func guestPhase(phase string) {
	g := &guest{newLinux(slog.New(slog.DiscardHandler), nodeVault(nil)), context.Background()}
	g.rootDev = func() string { return "" }
	switch phase {
	case "make":
		g.make()
	case "grow":
		g.grow()
	case "stolen":
		g.stolen()
	case "file":
		g.round(nil, "")
		g.data()
		if s := g.state(); s.partitionOf(StateVolume).Why != "" {
			fmt.Println("why:", s.partitionOf(StateVolume).Why)
		}
	}
}

var guestSpec = config.Storage{Disk: "/dev/vda", StateSize: 64 * mib}

func (g *guest) state() State {
	s, err := g.Read(g.ctx)
	must("read", err)
	return s
}

func (s State) partitionOf(name VolumeName) Partition {
	p, _ := s.partition(name)
	return p
}

// round does what is planned and prints how long each step took. expect, if not "", must be in the error.
func (g *guest) round(want *config.Storage, expect string) {
	steps, err := planFor(want, g.state())
	for _, s := range steps {
		start := time.Now()
		e := g.Do(g.ctx, s)
		if s.Op != opEntry {
			fmt.Printf("%-70s %s\n", s, time.Since(start).Round(time.Millisecond))
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", s, e))
		}
	}
	switch {
	case err != nil && (expect == "" || !strings.Contains(err.Error(), expect)):
		wrong("round: %v", err)
	case err == nil && expect != "":
		wrong("round: no error, want %s", expect)
	case err != nil:
		fmt.Println("refused:", err)
	}
}

// settled wants nothing to be left.
func (g *guest) settled(want *config.Storage) {
	if rest, err := planFor(want, g.state()); err != nil || len(rest) > 0 {
		wrong("left: %v, %v", rest, err)
	}
}

const marker = "this text must not be found on the disk in the open. "

// data checks what phase make wrote.
func (g *guest) data() {
	for _, dir := range []string{"/state/machined", "/var/lib/kubeletd"} {
		b, err := os.ReadFile(dir + "/data")
		if err != nil || sha256.Sum256(b) != sha256.Sum256(bytes.Repeat([]byte(marker), 100_000)) {
			wrong("data in %s: %d bytes, %v", dir, len(b), err)
		}
	}
}

func (g *guest) make() {
	g.round(nil, "")
	if s := g.state(); len(s.Disks) != 2 || len(s.Disks[0].Partitions) != 4 {
		wrong("before there is a spec: %+v", s.Disks)
	}
	start := time.Now()
	g.round(&guestSpec, "")
	fmt.Println("both volumes made in", time.Since(start).Round(time.Millisecond))
	g.settled(&guestSpec)
	for _, dir := range []string{"/state/machined", "/var/lib/kubeletd"} {
		f, err := os.Create(dir + "/data")
		must("data", err)
		_, err = f.Write(bytes.Repeat([]byte(marker), 100_000))
		must("data", errors.Join(err, f.Sync(), f.Close()))
	}
	s := g.state()
	m := s.TPM
	if !m.TPM || m.Useless() != "" || !m.Capped || !m.Owned {
		wrong("machine: %+v", m)
	}
	st := status(s, &controlv1.State{})
	for _, v := range st.Volumes {
		fmt.Printf("volume %s %s %s keys %v\n", v.Name, v.State, v.Encryption, v.Keys)
		if v.State != "mounted" || v.Encryption != "luks2" || v.Detail != "" {
			wrong("volume: %v", v)
		}
	}
	for _, n := range []int{5, 6} {
		if found, err := contains(fmt.Sprintf("/dev/vda%d", n), []byte(marker)); err != nil || found {
			wrong("the data are on partition %d in the open (%v)", n, err)
		}
	}
	k, ok := g.vault.RecoveryKey()
	if !ok {
		wrong("no recovery key")
	}
	fmt.Printf("RECOVERY %s\n", k.Expose())
	must("passphrase", g.add(vault.Wish{Kind: vault.Passphrase, Passphrase: secret.From([]byte("correct horse battery"))}))
	if err := g.vault.Open(g.ctx, g.target(StateVolume), nil); err == nil || !strings.Contains(err.Error(), "asked once") {
		wrong("STATE opens twice: %v", err)
	}
}

func (g *guest) target(name VolumeName) vault.Target {
	p := g.state().partitionOf(name)
	return vault.Target{Name: string(name), Device: p.Device, Dev: p.Dev, Size: p.KernelSize}
}

func (g *guest) volumes() (vault.Volumes, func()) {
	state, vari := g.target(StateVolume), g.target(VarVolume)
	folder, err := g.folder(g.state())
	must("folder", err)
	return vault.Volumes{State: &state, Var: &vari, Folder: folder}, func() { folder.Close() }
}

func (g *guest) add(w vault.Wish) error {
	o, end := g.volumes()
	defer end()
	_, _, err := g.vault.Add(g.ctx, o, w)
	return err
}

func (g *guest) grow() {
	start := time.Now()
	g.round(nil, "")
	fmt.Println("opened and mounted in", time.Since(start).Round(time.Millisecond))
	g.data()
	before := g.state().Volumes[VarVolume].Size
	g.round(&guestSpec, "")
	g.settled(&guestSpec)
	if after := g.state().Volumes[VarVolume].Size; after < before+2*gib-100*mib {
		wrong("VAR was %d bytes, is %d", before, after)
	}
	g.data()
	o, end := g.volumes()
	defer end()
	p := g.state().partitionOf(StateVolume)
	for _, k := range p.LUKS.Keys {
		if k.Kind == vault.Passphrase {
			continue
		}
		start := time.Now()
		_, text, err := g.vault.Rotate(g.ctx, o, "STATE", k.Slot, secret.Bytes{})
		must("rotate", err)
		fmt.Printf("rotate %s: %s\n", k.Kind, time.Since(start).Round(time.Millisecond))
		if text != "" {
			fmt.Printf("RECOVERY %s\n", text)
		}
	}
	// The firmware has no such file in this boot.
	if err := g.add(vault.Wish{Kind: vault.KeyFile, Firmware: "opt/test.key"}); err == nil {
		wrong("a key file that is not there")
	}
	g.data()
}

func (g *guest) stolen() {
	g.round(nil, "the TPM was cleared or exchanged")
	s := g.state()
	if p := s.partitionOf(StateVolume); p.Map.Device != "" || !strings.Contains(p.Why, "cleared or exchanged") {
		wrong("STATE: %+v", p)
	}
	if _, err := os.Stat("/run/bulkhead/storaged/locked"); err != nil {
		wrong("trustd is not told: %v", err)
	}
	g.round(nil, "STATE is locked")
	locked := g.state().targets(false)
	binding := make([]byte, unlock.BindingSize)
	try := func(kind, text string) ([]string, error) {
		key, err := unlock.Normalize(kind, text)
		must("normalize", err)
		all, err := g.vault.Challenges(locked, binding)
		must("challenges", err)
		for _, c := range all {
			v := unlock.Verifier(kind, key, c.Salt)
			if string(c.Kind) == kind && unlock.Equal(c.Proof, unlock.NodeProof(v, binding)) {
				return g.vault.Unlock(locked, vault.Kind(kind), secret.From(key), binding, unlock.CallerProof(v, binding))
			}
		}
		return nil, vault.ErrProof
	}
	if _, err := try(unlock.Passphrase, "correct horse batterie"); !errors.Is(err, vault.ErrProof) {
		wrong("a wrong passphrase: %v", err)
	}
	start := time.Now()
	opened, err := try(unlock.Recovery, word("test.key"))
	fmt.Println("unlocked", opened, "in", time.Since(start).Round(time.Millisecond))
	if err != nil || len(opened) != 2 {
		wrong("unlock: %v, %v", opened, err)
	}
	g.round(nil, "")
	g.data()
	g.settled(nil)
	if _, err := os.Stat("/run/bulkhead/storaged/locked"); err == nil {
		wrong("trustd is told that STATE is locked")
	}
	g.keyFile()
}

// keyFile adds one of the firmware, as if it had the file already.
func (g *guest) keyFile() {
	dir, err := os.MkdirTemp("", "fw")
	must("folder", err)
	must("folder", os.MkdirAll(dir+"/opt/test.key", 0o700))
	must("file", os.WriteFile(dir+"/opt/test.key/raw", bytes.Repeat([]byte("k"), 40), 0o600))
	v := vault.New(vault.Config{Mapper: func() (vault.Mapper, error) { return dm.Open("/dev/mapper/control") }, Firmware: dir})
	o, end := g.volumes()
	defer end()
	_, _, err = v.Add(g.ctx, o, vault.Wish{Kind: vault.KeyFile, Firmware: "opt/test.key"})
	must("key file", err)
}

// contains looks for a text on a device, by the page cache of the device itself.
func contains(device string, text []byte) (bool, error) {
	f, err := os.Open(device)
	if err != nil {
		return false, err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for at := int64(0); at < 256*mib; at += int64(len(b)) { // STATE, and where ext4 puts its first files
		n, err := f.ReadAt(b, at)
		if bytes.Contains(b[:n], text) {
			return true, nil
		}
		if err != nil {
			return false, nil // the end
		}
	}
	return false, nil
}

// oracle compares with cryptsetup, as root: it opens our volume, and we open its.
func oracle(recovery string) {
	for _, v := range volumes {
		must("unmount "+v.target, unix.Unmount(v.target, 0))
	}
	c, err := dm.Open("/dev/mapper/control")
	must("device-mapper", err)
	defer c.Close()
	for _, v := range volumes {
		must("remove", c.Remove(vault.MapName(string(v.name))))
	}
	cryptsetup := func(key string, argv ...string) {
		cmd := exec.Command("cryptsetup", argv...)
		cmd.Env = []string{"DM_DISABLE_UDEV=1", "PATH=/sbin"}
		cmd.Stdin = strings.NewReader(key)
		if out, err := cmd.CombinedOutput(); err != nil {
			wrong("cryptsetup %v: %v: %s", argv, err, out)
		}
	}
	g := &guest{newLinux(slog.New(slog.DiscardHandler), nodeVault(nil)), context.Background()}
	for i, v := range volumes {
		name := fmt.Sprintf("theirs%d", i)
		cryptsetup(recovery, "open", "--disable-keyring", "--key-file=-", fmt.Sprintf("/dev/vda%d", 5+i), name)
		must("mount by cryptsetup", unix.Mount("/dev/mapper/"+name, v.target, "ext4", unix.MS_RDONLY, ""))
	}
	g.data()
	for i, v := range volumes {
		must("unmount", unix.Unmount(v.target, 0))
		cryptsetup("", "close", fmt.Sprintf("theirs%d", i))
	}

	cryptsetup("their key", "luksFormat", "--type", "luks2", "--batch-mode", "--key-file=-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096", "/dev/vdb")
	cryptsetup("their key", "open", "--disable-keyring", "--key-file=-", "/dev/vdb", "theirs")
	_, err = run(context.Background(), time.Minute, "mkfs.ext4", "-q", "-F", "-L", "theirs", "/dev/mapper/theirs")
	must("mkfs", err)
	cryptsetup("", "close", "theirs")
	f, err := os.Open("/dev/vdb")
	must("open", err)
	defer f.Close()
	h, health, err := luks.Read(f)
	if err != nil || !health.OK() {
		wrong("their header: %v, %v", health, err)
		return
	}
	vk, _, err := h.Open(f, secret.From([]byte("their key")))
	must("their key", err)
	n, err := size(f)
	must("size", err)
	s, err := c.Create("ours", "", dm.Crypt{Device: attr("/sys/class/block/vdb/dev"), Offset: h.Segment.Offset, Length: n - h.Segment.Offset, SectorSize: h.Segment.SectorSize, Key: vk})
	must("create", err)
	r, err := probeDevice(Map{Device: fmt.Sprintf("/dev/dm-%d", s.Minor), Size: n - h.Segment.Offset})
	if err != nil || r.Kind != probe.Ext4 || r.Label != "theirs" {
		wrong("on their volume we find %v, %v", r, err)
	}
	must("remove", c.Remove("ours"))
	fmt.Println("cryptsetup opened ours, and we opened its")
}
