package qemu

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write testdata anew")

// aMachine has a name that no other test uses and lives in a folder of its own.
func aMachine(t *testing.T) Machine {
	t.Helper()
	t.Setenv("BULKHEAD_MACHINES", t.TempDir())
	m, err := New("test")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// anImage is a folder that looks like an image's.
func anImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range kernelFiles {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(dir, diskFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("data"), 100<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(200 << 20); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestArgs(t *testing.T) {
	plain := Machine{Name: "one", Dir: "/machines/one", UUID: "u-u-i-d", Memory: 4096, CPUs: 2, DiskSize: 8 << 30}
	full := plain
	full.Forwards = []Forward{{"api", 50000, 50000, "--api-port"}, {"kubernetes", 16443, 6443, ""}}
	full.Append, full.Isolated, full.Durable, full.Extra = "debug", true, true, []string{"-device", "virtio-balloon"}
	secure := plain
	secure.Firmware, secure.SecureBoot, secure.TPM = UEFI, true, true
	recorded := plain
	recorded.Record = "record"
	clustered := plain
	clustered.LAN, clustered.LANAddress = "demo", netip.MustParsePrefix("10.5.0.11/24")
	clustered.Slow, clustered.SlowSince = 3, time.Now()
	installs := secure
	installs.Medium = true
	var b strings.Builder
	for _, test := range []struct {
		name    string
		m       Machine
		accel   string
		claimed bool
	}{{"plain, emulated", plain, accelTCG, false}, {"everything, kvm", full, accelKVM, true}, {"firmware, Secure Boot, TPM", secure, accelTCG, true}, {"an installation medium", installs, accelTCG, true}, {"recorded", recorded, accelTCG, false}, {"on a LAN, slow", clustered, accelTCG, false}} {
		fmt.Fprintf(&b, "# %s", test.name)
		for _, arg := range test.m.args("bulkhead a=b\n", test.accel, 2596120, test.claimed) {
			if strings.HasPrefix(arg, "-") {
				b.WriteString("\n" + arg)
			} else {
				b.WriteString(" " + arg)
			}
		}
		fmt.Fprintln(&b)
	}
	golden := filepath.Join("testdata", "args.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || b.String() != string(want) {
		t.Errorf("%v; got\n%s\nwant\n%s", err, b.String(), want)
	}
}

// Machines of one cluster have the same time, whenever each is started.
func TestFakeTime(t *testing.T) {
	since := time.Date(2026, 11, 28, 5, 0, 0, 0, time.UTC)
	m := Machine{Slow: 4, SlowSince: since}
	for after, want := range map[time.Duration]string{0: "-0.000 x0.250000000", 100 * time.Second: "-75.000 x0.250000000", -time.Second: "-0.000 x0.250000000"} {
		if got := m.fakeTime(since.Add(after)); got != want {
			t.Errorf("after %v: %q, want %q", after, got, want)
		}
	}
	if env, err := (Machine{}).slowEnv(since); env != nil || err != nil {
		t.Errorf("a machine with the host's clocks: %q, %v", env, err)
	}
}

func TestValidate(t *testing.T) {
	for want, change := range map[string]func(*Machine){
		`machine name "A b": want 1 to 32 small letters`:  func(m *Machine) { m.Name = "A b" },
		`machine name "../x": want`:                       func(m *Machine) { m.Name = "../x" },
		`memory: 16 MiB is below 256`:                     func(m *Machine) { m.Memory = 16 },
		`cpus: 0 is not in 1 to 255`:                      func(m *Machine) { m.CPUs = 0 },
		`disk: 5 bytes is below 1 GiB`:                    func(m *Machine) { m.DiskSize = 5 },
		`accelerator "hvf": want kvm or tcg`:              func(m *Machine) { m.Accel = "hvf" },
		`forward api: 70000 to 1 are not ports`:           func(m *Machine) { m.Forwards = []Forward{{"api", 70000, 1, ""}} },
		`firmware "bios": want uefi`:                      func(m *Machine) { m.Firmware = "bios" },
		`secure boot is a matter of the firmware uefi`:    func(m *Machine) { m.SecureBoot = true },
		`append: with the firmware uefi the kernel's`:     func(m *Machine) { m.Firmware, m.Append = UEFI, "debug" },
		`record: "../x" is not the name of a file`:        func(m *Machine) { m.Record = "../x" },
		`LAN "a/b": want 1 to 32 small letters`:           func(m *Machine) { m.LAN = "a/b" },
		`LAN address fd00::1/64: want one of IPv4`:        func(m *Machine) { m.LAN, m.LANAddress = "a", netip.MustParsePrefix("fd00::1/64") },
		`LAN address 10.5.0.11/24: want one of IPv4, and`: func(m *Machine) { m.LANAddress = netip.MustParsePrefix("10.5.0.11/24") },
		`slow clocks: 11 is not in 2 to 10`:               func(m *Machine) { m.Slow, m.SlowSince = 11, time.Now() },
		`slow clocks: 3 times since 0001-01-01`:           func(m *Machine) { m.Slow = 3 },
		`slow clocks: with the firmware uefi`:             func(m *Machine) { m.Slow, m.SlowSince, m.Firmware = 3, time.Now(), UEFI },
		`folder "rel" is not absolute`:                    func(m *Machine) { m.Dir = "rel" },
	} {
		m := aMachine(t)
		change(&m)
		if err := m.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestLife(t *testing.T) {
	m, image := aMachine(t), anImage(t)
	m.Forwards = []Forward{{"api", 0, 50000, "--api-port"}}
	if s := m.Status(); s.State != Absent {
		t.Errorf("before: %+v", s)
	}
	if _, err := Load("test"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load before Create: %v", err)
	}
	if err := m.Create(image, []byte("key")); err != nil {
		t.Fatal(err)
	}
	if err := m.Create(image, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second Create: %v", err)
	}
	got, err := Load("test")
	if err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Errorf("Load: %v\ngot  %+v\nwant %+v", err, got, m)
	}
	if names, err := List(); err != nil || fmt.Sprint(names) != "[test]" {
		t.Errorf("List: %v, %v", names, err)
	}
	if fi, err := os.Stat(filepath.Join(m.Dir, ClaimKeyFile)); err != nil || fi.Mode() != 0o600 {
		t.Errorf("claim key: %v, %v", fi, err)
	}
	checkDisk(t, filepath.Join(m.Dir, diskFile))
	if s := m.Status(); s.State != Stopped {
		t.Errorf("created: %+v", s)
	}
	if err := m.Stop(t.Context(), time.Second); err != nil {
		t.Errorf("Stop of one that is off: %v", err)
	}
	if err := m.Remove(); err != nil || m.Status().State != Absent {
		t.Errorf("Remove: %v, then %+v", err, m.Status())
	}
	if err := m.Remove(); err != nil {
		t.Errorf("second Remove: %v", err)
	}
}

func checkDisk(t *testing.T, path string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 8<<30 || st.Blocks*512 > 1<<20 {
		t.Errorf("disk: %d bytes, %d allocated: want 8 GiB, nearly all of it a hole", st.Size, st.Blocks*512)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 4)
	if _, err := f.ReadAt(b, 100<<20); err != nil || string(b) != "data" {
		t.Errorf("disk: %q, %v", b, err)
	}
}

// TestMedium: a machine that is to be installed has an empty disk and a copy of the medium, until that is taken out.
func TestMedium(t *testing.T) {
	m, image := aMachine(t), anImage(t)
	m.Medium = true
	if err := m.Validate(); err == nil || !strings.Contains(err.Error(), "firmware uefi") {
		t.Errorf("without a firmware: %v", err)
	}
	m.Firmware = UEFI
	if _, err := os.Stat(firmwareVars); err != nil {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal(err)
		}
		t.Skip("no firmware: install the package ovmf")
	}
	if err := m.Create(image, nil); err == nil || !strings.Contains(err.Error(), "make dist") {
		t.Errorf("without an ISO: %v", err)
	}
	if err := os.WriteFile(filepath.Join(image, isoFile), []byte("iso"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.Create(image, nil); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(m.Dir, diskFile), &st); err != nil || st.Size != m.DiskSize || st.Blocks != 0 {
		t.Errorf("the disk has %d bytes, %d blocks of them used, %v", st.Size, st.Blocks, err)
	}
	if b, err := os.ReadFile(filepath.Join(m.Dir, mediumFile)); string(b) != "iso" {
		t.Errorf("the medium is %q, %v", b, err)
	}
	if err := m.Eject(); err != nil {
		t.Fatal(err)
	}
	if again, err := Load(m.Name); err != nil || again.Medium {
		t.Errorf("the medium is still there: %v", err)
	}
}

func TestCreateLeavesNothing(t *testing.T) {
	m := aMachine(t)
	if err := m.Create(t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "make image") {
		t.Errorf("no image: %v", err)
	}
	m.DiskSize = 1 << 30
	image := anImage(t)
	if err := os.Truncate(filepath.Join(image, diskFile), 2<<30); err != nil {
		t.Fatal(err)
	}
	if err := m.Create(image, nil); err == nil || !strings.Contains(err.Error(), "is below the image's") {
		t.Errorf("small disk: %v", err)
	}
	if _, err := os.Stat(m.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
}

// A folder that is not a machine's is never deleted.
func TestRemoveForeign(t *testing.T) {
	m := aMachine(t)
	if err := os.MkdirAll(filepath.Join(m.Dir, "precious"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir, "precious")); err != nil {
		t.Error(err)
	}
}

func TestPorts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	m := aMachine(t)
	m.Memory = 256
	m.Forwards = []Forward{{"api", port, 50000, "--api-port"}}
	want := fmt.Sprintf("port %d of 127.0.0.1 (api) is taken: choose another with --api-port", port)
	if err := m.Check(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	m.Forwards = []Forward{{"api", 0, 50000, ""}, {"rest", 0, 50001, ""}}
	if err := m.choosePorts(); err != nil {
		t.Fatal(err)
	}
	if a, b := m.Port(50000), m.Port(50001); a == 0 || b == 0 || a == b || m.Port(1) != 0 {
		t.Errorf("chose %d and %d", a, b)
	}
}

func TestMemory(t *testing.T) {
	if n, ok := memAvailable("MemTotal: 1 kB\nMemAvailable:   2097152 kB\n"); !ok || n != 2048 {
		t.Errorf("got %d, %v", n, ok)
	}
	m := aMachine(t)
	m.Memory = 1 << 30
	if err := m.Check(); err == nil || !strings.Contains(err.Error(), "give it less with --memory") {
		t.Errorf("got %v", err)
	}
}

// A pid file that names somebody else's process must not lead to a signal.
func TestForeignProcess(t *testing.T) {
	m := aMachine(t)
	if err := m.Create(anImage(t), nil); err != nil {
		t.Fatal(err)
	}
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer other.Process.Kill()
	for _, text := range []string{fmt.Sprint(other.Process.Pid), "1", "0", "-1", "x", "", "999999999"} {
		if err := os.WriteFile(m.pidPath(), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.Kill(t.Context()); err != nil || m.Status().State != Stopped {
			t.Errorf("pid file %q: %v, %+v", text, err, m.Status())
		}
	}
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Error("another process was killed")
	}
	for _, test := range []struct {
		cmdline string
		want    bool
	}{
		{"/usr/bin/qemu-system-x86_64\x00-pidfile\x00" + m.pidPath() + "\x00", true},
		{"/usr/bin/qemu-system-x86_64\x00-pidfile\x00" + m.pidPath() + "2\x00", false},
		{"vi\x00-pidfile\x00" + m.pidPath() + "\x00", false},
		{"qemu-system-x86_64\x00-pidfile", false},
		{"", false},
	} {
		if got := owns([]byte(test.cmdline), "qemu-system-", m.pidPath()); got != test.want {
			t.Errorf("owns(%q) = %v", test.cmdline, got)
		}
	}
}

func TestUnpackKernel(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	bzImage := func(payload []byte) []byte {
		b := make([]byte, 3*512+8+len(payload)+4)
		b[0x1f1] = 2
		copy(b[0x202:], "HdrS\x0f\x02")
		binary.LittleEndian.PutUint32(b[0x248:], 8)
		binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)+4))
		copy(b[3*512+8:], payload)
		binary.LittleEndian.PutUint32(b[len(b)-4:], 13) // not below what "good" has
		return b
	}
	huge := bzImage(enc.EncodeAll([]byte("\x7fELF"), nil))
	binary.LittleEndian.PutUint32(huge[len(huge)-4:], maxKernel+1)
	good := bzImage(enc.EncodeAll([]byte("\x7fELF and more"), nil))
	if got, err := unpackKernel(good); err != nil || string(got) != "\x7fELF and more" {
		t.Errorf("got %q, %v", got, err)
	}
	for want, b := range map[string][]byte{
		"not a bzImage":        []byte("MZ"),
		"not packed with zstd": bzImage([]byte("\x1f\x8b3456789")),
		"no ELF file inside":   bzImage(enc.EncodeAll([]byte("text"), nil)),
		"payload from":         good[:len(good)-9],
		"it has 268435457":     huge,
		"unpack: ":             bzImage([]byte("\x28\xb5\x2f\xfd nothing good")),
	} {
		if _, err := unpackKernel(b); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// TestBoot powers a real image on, cuts its power, resets it and stops it, judging by the console alone.
func TestBoot(t *testing.T) {
	if os.Getenv("BULKHEAD_VM") == "" {
		t.Skip("needs a virtual machine: make test-vm")
	}
	m := aMachine(t)
	m.Memory = 1024
	m.Forwards = []Forward{{"api", 0, 50000, "--api-port"}}
	image := cmp.Or(os.Getenv("BULKHEAD_IMAGE"), filepath.Join("..", "..", "out", "image"))
	if err := m.Create(image, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	boots := func(what string, n int) {
		t.Helper()
		start := time.Now()
		for deadline := start.Add(2 * time.Minute); ; {
			text, _ := os.ReadFile(m.Console())
			if strings.Count(string(text), "root verified (dm-verity") == n {
				t.Logf("%s: root verified after %s", what, time.Since(start).Round(10*time.Millisecond))
				return
			}
			if time.Now().After(deadline) || m.Status().State != Running {
				t.Fatalf("%s: %+v; console:\n%s", what, m.Status(), text)
			}
			select {
			case <-t.Context().Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(m.Start(t.Context(), func(s string) { t.Log(s) }))
	boots("power on", 1)
	must(m.Start(t.Context(), nil))
	must(m.Reset(t.Context()))
	boots("reset", 2)
	if err := m.Remove(); err == nil {
		t.Fatal("removed a running machine")
	}
	must(m.Kill(t.Context()))
	if s := m.Status(); s.State != Stopped {
		t.Fatalf("after the power cut: %+v", s)
	}
	must(m.Start(t.Context(), nil))
	boots("power on after a cut", 1)
	must(m.Stop(t.Context(), 0))
	must(m.Remove())
}
