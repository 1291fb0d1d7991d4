package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLANInVM sends a frame from one real QEMU to another through the switch, and again through one that was started anew. There is no guest in them: a hub inside each joins
// the LAN to a datagram socket of this test.
func TestLANInVM(t *testing.T) {
	if os.Getenv("BULKHEAD_VM") == "" {
		t.Skip("needs QEMU: make test-vm")
	}
	image := anImage(t)
	t.Setenv("BULKHEAD_MACHINES", t.TempDir())
	var machines []Machine
	var hubs []int
	for _, name := range []string{"demo-1", "demo-2"} {
		m, err := New(name)
		if err != nil {
			t.Fatal(err)
		}
		m.LAN, m.LANAddress = "demo", netip.MustParsePrefix("10.5.0.11/24")
		if err := m.Create(image, nil); err != nil {
			t.Fatal(err)
		}
		hubs = append(hubs, startHub(t, m))
		machines = append(machines, m)
	}
	out, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: machines[1].path("out.sock"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	listening := [2]int{sockets(t, hubs[0]), sockets(t, hubs[1])}
	frame := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 0x88, 0xb5}, strings.Repeat("x", 100)...)
	for _, round := range []string{"first switch", "second switch"} {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- RunLAN(ctx, "demo", slog.New(slog.NewTextHandler(t.Output(), nil))) }()
		// QEMU 7.2 crashes if a frame comes before it listens, and nobody sees that it does until it has accepted a connection. No guest is that early.
		for i, pid := range hubs {
			for end := time.Now().Add(30 * time.Second); sockets(t, pid) <= listening[i]; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%s: machine %d has not taken the connection", round, i+1)
				}
			}
		}
		// Until QEMU has taken the second switch's connection, frames are lost as with any cable that is not plugged in: so they are sent until one arrives.
		buf := make([]byte, 2000)
		for deadline := time.Now().Add(30 * time.Second); ; {
			if c, err := net.Dial("unixgram", machines[0].path("in.sock")); err == nil {
				_, _ = c.Write(frame)
				c.Close()
			}
			if err := out.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			n, err := out.Read(buf)
			if err == nil && slices.Equal(buf[:n], frame) {
				break
			}
			if err == nil {
				t.Errorf("%s: another frame came: %x", round, buf[:n])
			}
			if time.Now().After(deadline) {
				control, err := LANControl("demo")
				if err != nil {
					t.Fatal(err)
				}
				status, err := control.Status(ctx)
				t.Fatalf("%s: no frame came; the switch: %+v, %v", round, status, err)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		for drained := false; !drained; { // late ones must not pass for the next round's
			_ = out.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, err := out.Read(buf)
			drained = err != nil
		}
	}
}

// sockets counts those that a process has.
func sockets(t *testing.T, pid int) (n int) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(links) == 0 {
		t.Fatalf("process %d has ended: %v", pid, err)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// startHub starts a QEMU without a machine, with the arguments of m's LAN, and waits until its sockets are there. It returns its process.
func startHub(t *testing.T, m Machine) int {
	t.Helper()
	args := m.args("", accelTCG, hostTSC(), false)
	i := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "stream,") })
	cmd := exec.Command(program, "-no-user-config", "-nodefaults", "-display", "none", "-machine", "none", "-netdev", args[i], "-netdev", "hubport,id=a,hubid=0,netdev=lan",
		"-netdev", "dgram,id=test,local.type=unix,local.path=in.sock,remote.type=unix,remote.path=out.sock", "-netdev", "hubport,id=b,hubid=0,netdev=test")
	dir, err := os.Open(m.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd.Dir, cmd.ExtraFiles, cmd.Stderr = m.Dir, []*os.File{nil, dir}, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, in := os.Stat(m.path("in.sock"))
		_, lan := os.Stat(m.path(LANSocket))
		if in == nil && lan == nil {
			return cmd.Process.Pid
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU does not listen: %v, %v", in, lan)
		}
	}
}
