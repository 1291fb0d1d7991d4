package networkd

import (
	"os"
	"path/filepath"
	"testing"
)

// A family whose table cannot be read must not leave the other one without a firewall.
func TestFirewallReadsWhatItCan(t *testing.T) {
	dir := t.TempDir()
	const save = "#!/bin/sh\necho '*filter'\necho ':INPUT ACCEPT [0:0]'\necho COMMIT\n"
	if err := os.WriteFile(filepath.Join(dir, "iptables-save"), []byte(save), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if err := os.WriteFile(filepath.Join(dir, "ip6tables-save"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	f := &firewall{families: []Family{IPv6, IPv4}}
	for range 2 { // the second time too: what is wrong is not to be forgotten
		tables, _, err := f.read(t.Context())
		if err == nil || len(tables) != 1 || tables[0].Family != IPv4 {
			t.Errorf("got %+v, %v; want the table of IPv4, and what is wrong with IPv6", tables, err)
		}
	}
}
