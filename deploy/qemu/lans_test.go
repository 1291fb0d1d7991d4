package qemu

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A switch finds the machines of its own network, and only one runs for each.
func TestLAN(t *testing.T) {
	image := anImage(t)
	t.Setenv("BULKHEAD_MACHINES", t.TempDir())
	for _, name := range []string{"demo-1", "demo-2", "other"} {
		m, err := New(name)
		if err != nil {
			t.Fatal(err)
		}
		m.LAN, m.LANAddress = "demo", netip.MustParsePrefix("10.5.0.11/24")
		if name == "other" {
			m.LAN, m.LANAddress = "", netip.Prefix{}
		}
		if err := m.Create(image, nil); err != nil {
			t.Fatal(err)
		}
	}
	members, err := Members("demo")
	if err != nil || len(members) != 2 || members[0].Name != "demo-1" || members[1].LANAddress.String() != "10.5.0.11/24" {
		t.Fatalf("%+v, %v", members, err)
	}
	// QEMU's end of the second machine; the first one is off.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: members[1].path(LANSocket), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := slog.New(slog.DiscardHandler)
	ended := make(chan error, 1)
	go func() { ended <- RunLAN(t.Context(), "demo", log) }()
	if err := l.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := RunLAN(t.Context(), "demo", log); !errors.Is(err, ErrLANRuns) {
		t.Errorf("a second switch: %v", err)
	}
	c, err := LANControl("demo")
	if err != nil {
		t.Fatal(err)
	}
	st, err := c.Status(t.Context())
	for err == nil && len(st.Ports) == 0 { // the switch dials first, and has the machine a moment later
		st, err = c.Status(t.Context())
	}
	if err != nil || len(st.Ports) != 1 || st.Ports[0].Name != "demo-2" {
		t.Errorf("%+v, %v", st, err)
	}
	if err := StopLAN(t.Context(), "demo"); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(c.Dir); !os.IsNotExist(err) {
		t.Errorf("the switch left its folder: %v", err)
	}
	if err := StopLAN(t.Context(), "demo"); err != nil {
		t.Errorf("again: %v", err)
	}
	if names, err := List(); err != nil || len(names) != 3 {
		t.Errorf("machines: %v, %v", names, err)
	}
}

func TestLANOfAKilledSwitch(t *testing.T) {
	t.Setenv("BULKHEAD_MACHINES", t.TempDir())
	dir, err := lanDir("demo")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, lanPidFile), []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := StopLAN(t.Context(), "demo"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := RunLAN(ctx, "../x", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), `LAN "../x"`) {
		t.Error(err)
	}
}
