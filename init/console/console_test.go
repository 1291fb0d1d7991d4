package console

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.00 s", 80 * time.Millisecond: "0.08 s", 100 * time.Millisecond: "0.1 s", 2400 * time.Millisecond: "2.4 s", 10 * time.Second: "10 s",
	} {
		if got := Seconds(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestMounts(t *testing.T) {
	got := fmt.Sprint(Mounts([]byte(`22 1 254:0 / / ro,relatime shared:1 - squashfs /dev/dm-0 ro
30 22 254:3 / /var/lib/a\040b rw shared:2 master:1 - ext4 /dev/vda4 rw
not a line
31 22 0:1 / /odd"name rw - tmpfs none rw
`)))
	if want := `[{/ squashfs /dev/dm-0} {/var/lib/a b ext4 /dev/vda4} {/odd"name tmpfs none}]`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestFirst(t *testing.T) {
	var f First
	one := errors.New("one")
	f.Try("a", nil)
	f.Try("b", one)
	f.Try("c", errors.New("two"))
	if !errors.Is(f.Err, one) || f.Err.Error() != "b: one" {
		t.Errorf("got %v", f.Err)
	}
}
