package supervise

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/testns"
)

// PID 1 binds before anybody has brought lo up, and who connects later waits in the backlog. All other addresses are closed.
func TestListenLoopback(t *testing.T) {
	testns.New(t)
	fd, err := listen("loopback:7445", "")
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	client := func() int {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	up := client()
	defer unix.Close(up)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(up, unix.SIOCSIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
	for address, want := range map[[4]byte]error{{127, 0, 0, 1}: nil, {127, 0, 0, 2}: unix.ECONNREFUSED} {
		s := client()
		if err := unix.Connect(s, &unix.SockaddrInet4{Port: 7445, Addr: address}); err != want {
			t.Errorf("connect to %v: %v, want %v", address, err, want)
		}
		unix.Close(s)
	}
}
