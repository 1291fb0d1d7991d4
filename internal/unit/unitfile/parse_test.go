package unitfile

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const good = `{"name": "x", "exec": ["/bin/x", "-v"], "user": "networkd", "groups": ["etcdd"], "capabilities": ["NET_ADMIN", "CHOWN"],
"network": "host", "syscalls": ["@basic", "mount"], "sockets": ["unix"], "bind": [0, 80], "connect": ["ALL"], "read": ["/etc"], "listen": ["unix", "tcp:50000"], "memory_max": "64M", "restart": "always", "owners": ["kubeletd"], "runtime": "0750", "stop_timeout": "5s"}`

func TestParse(t *testing.T) {
	u, err := Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if u.UID != 104 || len(u.Groups) != 1 || u.Groups[0] != 109 || u.Capabilities != 1<<12|1 || u.MemoryMax != 64<<20 || u.Runtime != 0o750 ||
		u.StopTimeout != 5*time.Second || len(u.Owners) != 1 || u.Owners[0] != 110 ||
		!u.ConnectAll || u.Connect != nil || u.BindAll || fmt.Sprint(u.Bind) != "[0 80]" || u.FilesAll || !slices.Contains(u.Read, "/etc") ||
		!slices.Contains(u.Syscalls, "mount") || !slices.Contains(u.Syscalls, "socket") || !slices.Contains(u.Syscalls, "futex") || !slices.IsSorted(u.Syscalls) {
		t.Errorf("got %+v", u)
	}
}

// Each mistake is named with the field, what was found and what is allowed.
func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{`"name": "x"`, `"nam": "x"`, `unknown field "nam"`},
		{`"name": "x"`, `"name": "a/b"`, `"a/b" must have`},
		{`"/bin/x"`, `"x"`, `absolute path`},
		{`"user": "networkd"`, `"user": "nobody"`, `user: no user "nobody"; there are root, machined`},
		{`"NET_ADMIN"`, `"CAP_NET_ADMIN"`, `no capability "CAP_NET_ADMIN"`},
		{`"host"`, `"bridge"`, `network: "bridge" is none of`},
		{`"syscalls": ["@basic", "mount"]`, `"syscalls": []`, `syscalls: there are none`},
		{`"mount"`, `"mounts"`, `syscalls: no system call "mounts"; groups are @basic,`},
		{`"mount"`, `"socket"`, `syscalls: socket is not written: it follows from sockets`},
		{`["@basic", "mount"]`, `["ALL"]`, `mean nothing where all system calls are allowed`},
		{`["@basic", "mount"]`, `["ALL", "mount"]`, `no system call "ALL"`},
		{`["unix"]`, `["unix", "ax25"]`, `sockets: no family "ax25"; there are inet,`},
		{`["unix"]`, `["unix"], "ioctls": ["0x1"]`, `ioctls: no "0x1"`},
		{`[0, 80]`, `[65536]`, `bind: 65536 is not a port`},
		{`[0, 80]`, `[80, "ALL"]`, `"ALL"] must stand alone`},
		{`[0, 80]`, `80`, `bind: 80 is not a list`},
		{`"/etc"`, `"/etc/"`, `read: "/etc/" is not a clean`},
		{`"/etc"`, `"ALL"`, `read: "ALL" is not a clean`},
		{`"tcp:50000"`, `"udp:1"`, `listen: "udp:1" is neither`},
		{`"tcp:50000"`, `"loopback:0"`, `listen: "loopback:0" is neither`},
		{`"64M"`, `"64"`, `memory_max: "64" is not a size`},
		{`"always"`, `"often"`, `restart: "often" is none of`},
		{`"5s"`, `"five"`, `stop_timeout: "five"`},
		{`"0750"`, `"rwx"`, `runtime: "rwx"`},
		{`"5s"}`, `"5s"} {}`, `more than one`},
		{`"5s"}`, `"5s", "inside": "y"}`, `who holds namespaces for others or lives in such is root`},
		{`"5s"}`, `"5s", "show": ["/var"]}`, `only who holds them shows`},
	} {
		_, err := Parse([]byte(strings.Replace(good, c.old, c.new, 1)))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.new, err, c.want)
		}
	}
}

func TestLoadRefusesTwins(t *testing.T) {
	tree := fstest.MapFS{"a/unit.json": {Data: []byte(good)}, "b/x.unit.json": {Data: []byte(good)}, "c/testdata/unit.json": {Data: []byte("broken")}}
	if _, err := Load(tree); err == nil || !strings.Contains(err.Error(), "a/unit.json already") {
		t.Errorf("Load = %v, want the other file named", err)
	}
}

func TestLoadWantsAHolder(t *testing.T) {
	lives := strings.Replace(strings.Replace(good, `"networkd"`, `"root"`, 1), `"5s"}`, `"5s", "inside": "y"}`, 1)
	tree := fstest.MapFS{"x/unit.json": {Data: []byte(lives)}}
	if _, err := Load(tree); err == nil || !strings.Contains(err.Error(), `no unit "y" holds`) {
		t.Errorf("Load = %v, want the holder named", err)
	}
	tree["y/unit.json"] = &fstest.MapFile{Data: []byte(strings.Replace(strings.Replace(lives, `"x"`, `"y"`, 1), `"inside": "y"`, `"holds": true`, 1))}
	if _, err := Load(tree); err != nil {
		t.Errorf("Load = %v", err)
	}
}

// maxCalls is for a daemon without privileges, Go's runtime included.
const maxCalls = 70

var (
	// starts are the daemons that start programs: iptables, and ext4's tools.
	starts = map[string]bool{"networkd": true, "storaged": true}
	// waits are those that run before the volume with their folder is mounted. Landlock's rules are for a folder that is there.
	waits = map[string]bool{"machined": true, "trustd": true, "updated": true, "etcdd": true}
)

// TestUnits reads the units of this tree. Rules that hold for all of them stand here, once.
func TestUnits(t *testing.T) {
	units, err := Load(os.DirFS("../../.."))
	if err != nil {
		t.Fatal(err)
	}
	users := map[uint32]string{}
	workload := map[string]bool{"containerd": true, "kubelet": true, "kube-proxy": true, "image-load": true, "workload": true}
	for _, u := range units {
		if u.UID == 0 && !workload[u.Name] {
			t.Errorf("%s runs as root: only the workload side may", u.Name)
		}
		if first, twice := users[u.UID]; twice && u.UID != 0 {
			t.Errorf("%s and %s share user %d", first, u.Name, u.UID)
		}
		users[u.UID] = u.Name
		if u.Syscalls == nil && !workload[u.Name] {
			t.Errorf("%s may make every system call", u.Name)
		}
		privileged := u.Capabilities&^unit.Capability("SYSLOG") != 0
		if len(u.Syscalls) > maxCalls && !privileged && !strings.HasPrefix(u.Name, "kube-") {
			t.Errorf("%s may make %d system calls, a daemon without privileges at most %d", u.Name, len(u.Syscalls), maxCalls)
		}
		if Programs(u) && !workload[u.Name] && !starts[u.Name] {
			t.Errorf("%s may start programs", u.Name)
		}
		if u.FilesAll && !workload[u.Name] && u.Name != "storaged" { // which mounts: Landlock would not let it
			t.Errorf("%s may use every file", u.Name)
		}
		if slices.Contains(append(u.Read, u.Write...), "/") && !waits[u.Name] {
			t.Errorf("%s may use everything below /: only those may that wait for a volume", u.Name)
		}
		if (u.Network == "none" && !workload[u.Name]) && (u.BindAll || u.ConnectAll || len(u.Bind)+len(u.Connect) > 0) {
			t.Errorf("%s has no network, and ports", u.Name)
		}
		if len(u.Bind) > 0 && !slices.Contains(u.Sockets, "netlink:route") {
			t.Errorf("%s has TCP and no netlink:route: a caller from a link-local address would end it", u.Name)
		}
		if u.NewPrivileges && !workload[u.Name] {
			t.Errorf("%s may gain privileges", u.Name)
		}
		if lives := u.Inside == "workload"; lives != (workload[u.Name] && u.Name != "workload") {
			t.Errorf("%s lives inside %q", u.Name, u.Inside)
		}
		for _, p := range u.Show {
			if p == unit.RunDir || p == "/run" || strings.HasPrefix(p, unit.SocketDir) || strings.HasPrefix(p, unit.StateDir) {
				t.Errorf("%s shows %s to the workload side", u.Name, p)
			}
		}
		// The API server's memory grows with the cluster: any limit would be wrong for somebody.
		if u.MemoryMax == 0 && !workload[u.Name] && u.Name != "kube-apiserver" {
			t.Errorf("%s has no memory limit", u.Name)
		}
	}
	if len(units) == 0 {
		t.Error("no unit found")
	}
}
