package machined

import (
	"errors"
	"io/fs"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLinux reads this machine; it changes nothing.
func TestLinux(t *testing.T) {
	var h linux
	if h.Release() == "" {
		t.Error("no kernel release")
	}
	if b := h.Boot(); !b.Before(time.Now()) || b.Before(time.Unix(1e9, 0)) {
		t.Errorf("booted at %s", b)
	}
	if memory, cpu := h.Usage("../../x"); memory != 0 || cpu != 0 {
		t.Error("a path is no unit")
	}
	if _, err := h.State(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	size, err := h.KernelLogSize()
	if errors.Is(err, unix.EPERM) {
		t.Skip("the kernel's log needs CAP_SYSLOG")
	}
	if err != nil || size <= 0 {
		t.Fatalf("kernel log of %d bytes, %v", size, err)
	}
	if n, err := h.KernelLog(make([]byte, size)); err != nil || n > size {
		t.Errorf("read %d bytes, %v", n, err)
	}
}
