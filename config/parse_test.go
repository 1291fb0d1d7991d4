package config

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func full(t testing.TB) []byte {
	data, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// doc is one document of a kind.
func doc(kind, body string) string {
	return "apiVersion: " + APIVersion + "\nkind: " + kind + "\n" + body + "\n"
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"not a number", doc("Network", "interfaces:\n- name: eth0\n  mtu: abc"),
			`n.yaml:5: Network.interfaces[0].mtu: "abc" is not a number; allowed: 0, or 68 to 65535`},
		{"out of range", doc("Network", "interfaces:\n- {name: eth0, mtu: 67}"),
			`n.yaml:4: Network.interfaces[0].mtu: 67 is out of range; allowed: 0, or 68 to 65535`},
		{"hexadecimal", doc("Network", "interfaces:\n- {name: eth0, mtu: 0x5dc}"),
			`n.yaml:4: Network.interfaces[0].mtu: "0x5dc" is not a number; allowed: 0, or 68 to 65535`},
		{"unknown field", doc("Network", "interfaces:\n- {name: eth0, adresses: []}"),
			`n.yaml:4: Network.interfaces[0].adresses: no such field; nearest is addresses; there are name, dhcp, mtu, addresses, routes`},
		{"field of another case", doc("Machine", "Hostname: a"),
			`n.yaml:3: Machine.Hostname: no such field; nearest is hostname; there are hostname, role`},
		{"missing field", doc("Network", "firewall: {allow: [{protocol: udp}]}"),
			`n.yaml:3: Network.firewall.allow[0].port: is missing; allowed: 1 to 65535`},
		{"twice", doc("Machine", "hostname: a\nhostname: b"),
			`n.yaml:4: Machine.hostname: stands here twice; the first is in line 3`},
		{"other version", "apiVersion: bulkhead.dev/v2\nkind: Machine\nfoo: 1",
			`n.yaml:1: apiVersion: "bulkhead.dev/v2" is not known; the only version is bulkhead.dev/v1, with the kinds Machine, Network, Storage, Cluster, Kubernetes, Update, Access`},
		{"other kind", doc("Netwrk", ""),
			`n.yaml:2: kind: "Netwrk": no such kind; nearest is Network; there are Machine, Network, Storage, Cluster, Kubernetes, Update, Access (bulkhead.dev/v1)`},
		{"kind missing", "apiVersion: bulkhead.dev/v1",
			`n.yaml:1: kind: missing; there are Machine, Network, Storage, Cluster, Kubernetes, Update, Access`},
		{"same kind twice", doc("Machine", "hostname: a") + "---\n" + doc("Machine", "role: worker"),
			`n.yaml:6: kind: a second Machine; the first starts at line 1, write them as one`},
		{"no mapping", "- a", `n.yaml:1: a document must be a mapping that starts with "apiVersion: bulkhead.dev/v1" and "kind: …"`},
		{"a selector that selects nothing", doc("Storage", "install: {disk: {}}"),
			`n.yaml:3: Storage.install.disk: is empty; allowed: a mapping with at least one of device, transport, model, serial, wwn, size`},
		{"install without a disk", doc("Storage", "install: {}"),
			`n.yaml:3: Storage.install.disk: is missing; allowed: a mapping with at least one of device, transport, model, serial, wwn, size`},
		{"a size without a comparison", doc("Storage", "install: {disk: {size: 100GiB}}"),
			`n.yaml:3: Storage.install.disk.size: "100GiB" is not valid; allowed: a comparison like ">= 100GiB" or "> 100GiB, < 2TiB"`},
		{"two choices of a disk", doc("Storage", "disk: /dev/sda\ninstall: {disk: {serial: a}}"),
			`n.yaml:3: Storage.disk: "/dev/sda" is one choice of a disk and Storage.install another; STATE and VAR go where the system is installed: remove Storage.disk`},
		{"value missing", doc("Machine", "hostname:"), `n.yaml:3: Machine.hostname: has no value; remove the line for the default, or give it one`},
		{"empty text", doc("Machine", `hostname: ""`),
			`n.yaml:3: Machine.hostname: "" is empty; allowed: lower-case letters, digits, - and . as in RFC 1123, at most 63 characters`},
		{"number for text", doc("Machine", "hostname: 123"),
			`n.yaml:3: Machine.hostname: "123" is not text; put it in quotes; allowed: lower-case letters, digits, - and . as in RFC 1123, at most 63 characters`},
		{"upper case", doc("Machine", "hostname: Node"),
			`n.yaml:3: Machine.hostname: "Node" is not valid; allowed: lower-case letters, digits, - and . as in RFC 1123, at most 63 characters`},
		{"choice", doc("Machine", "role: workr"), `n.yaml:3: Machine.role: "workr" is unknown, nearest is worker; allowed: controlplane, worker`},
		{"boolean", doc("Storage", "wipe: yes"), `n.yaml:3: Storage.wipe: "yes" is neither true nor false; allowed: true, false`},
		{"list for value", doc("Machine", "role: [worker]"), `n.yaml:3: Machine.role: must be one value, not a list or mapping; allowed: controlplane, worker`},
		{"value for list", doc("Network", "nameservers: 10.0.0.1"), `n.yaml:3: Network.nameservers: must be a list: each entry on a line of its own, after "- "`},
		{"value for mapping", doc("Network", "firewall: on"), `n.yaml:3: Network.firewall: must be a mapping with the fields allow`},
		{"anchor", doc("Machine", "hostname: &a b"), `n.yaml:3: Machine.hostname: anchors and aliases are not read; write the value out`},
		{"tag", doc("Machine", "hostname: !!binary aGk="), `n.yaml:3: Machine.hostname: tag "!!binary" is not read; remove it`},
		{"merge", doc("Machine", "<<: {hostname: a}"), `n.yaml:3: Machine.<<: no such field; there are hostname, role`},
		{"size", doc("Storage", "stateSize: 256MB"), `n.yaml:3: Storage.stateSize: "256MB" is not a size; allowed: a number with KiB, MiB, GiB or TiB, like "64MiB"`},
		{"size too small", doc("Storage", "stateSize: 32MiB"), `n.yaml:3: Storage.stateSize: 32MiB is out of range; allowed: 64MiB to 64GiB`},
		{"encryption", doc("Storage", "encryption: luks"), `n.yaml:3: Storage.encryption: "luks" is unknown, nearest is luks2; allowed: auto, none, luks2`},
		{"keys without encryption", doc("Storage", "keys: [{kind: tpm}]"), `n.yaml:3: Storage.keys: keys are for encrypted volumes; set Storage.encryption to luks2`},
		{"a key that says where it is not", doc("Storage", "encryption: luks2\nkeys: [{kind: tpm, partition: KEY}]"), `n.yaml:4: Storage.keys[0].partition: is for kind keyFile; this key is of kind "tpm"`},
		{"a key file that is nowhere", doc("Storage", "encryption: luks2\nkeys: [{kind: keyFile}]"), `n.yaml:4: Storage.keys[0]: a key of kind keyFile has either partition or firmware`},
		{"a key service without a pin", doc("Storage", "encryption: luks2\nkeys: [{kind: kms, address: \"10.0.0.9:4050\"}]"), `n.yaml:4: Storage.keys[0].pin: is missing; allowed: "sha256:" and 64 hex digits`},
		{"a key on a volume of ours", doc("Storage", "encryption: luks2\nkeys: [{kind: keyFile, partition: VAR}]"), `n.yaml:4: Storage.keys[0].partition: "VAR" is not valid; allowed: a name like "KEY", at most 36 characters, and none of Bulkhead's own`},
		{"a key file outside of the firmware", doc("Storage", "encryption: luks2\nkeys: [{kind: keyFile, firmware: opt/../etc}]"), `n.yaml:4: Storage.keys[0].firmware: "opt/../etc" is not valid; allowed: a name like "opt/org.example/key", at most 55 characters`},
		{"a key service without a port", doc("Storage", "encryption: luks2\nkeys: [{kind: kms, address: 10.0.0.9, pin: sha256:00}]"),
			"n.yaml:4: Storage.keys[0].address: \"10.0.0.9\" is not valid; allowed: a host and port like \"10.0.0.9:4050\"\n" +
				"n.yaml:4: Storage.keys[0].pin: \"sha256:00\" is not valid; allowed: \"sha256:\" and 64 hex digits"},
		{"a key twice", doc("Storage", "encryption: luks2\nkeys:\n- kind: tpm\n- kind: tpm"), `n.yaml:6: Storage.keys[1]: this key stands here twice; the first is Storage.keys[0]`},
		{"disk", doc("Storage", "disk: /dev/../etc"), `n.yaml:3: Storage.disk: "/dev/../etc" is not valid; allowed: "system" or a device like "/dev/vda"`},
		{"address", doc("Network", "nameservers: [10.0.0.256]"), `n.yaml:3: Network.nameservers[0]: "10.0.0.256" is not an address; allowed: an address like "10.0.0.1"`},
		{"prefix", doc("Network", "interfaces:\n- name: eth0\n  addresses:\n  - 10.0.0.3"),
			`n.yaml:6: Network.interfaces[0].addresses[0]: "10.0.0.3" is not an address with a prefix length; allowed: an address with its prefix length like "10.0.0.3/24"`},
		{"network address", doc("Network", "interfaces:\n- name: eth0\n  addresses:\n  - 10.0.0.0/24"),
			`n.yaml:6: Network.interfaces[0].addresses[0]: "10.0.0.0/24" is the address of the network, no host has it; the first host is "10.0.0.1/24"`},
		{"broadcast address", doc("Network", "interfaces:\n- name: eth0\n  addresses: [10.0.3.255/22]"),
			`n.yaml:5: Network.interfaces[0].addresses[0]: "10.0.3.255/22" is the broadcast address of its network, no host has it; the last host is "10.0.3.254/22"`},
		{"address twice", doc("Network", "interfaces:\n- name: eth0\n  addresses: [10.0.0.3/24]\n- name: eth1\n  addresses: [10.0.0.3/16]"),
			`n.yaml:7: Network.interfaces[1].addresses[0]: "10.0.0.3" stands here twice; the first is Network.interfaces[0].addresses[0]`},
		{"link twice", doc("Network", "interfaces:\n- name: eth0\n- name: eth0"),
			`n.yaml:5: Network.interfaces[1].name: "eth0" stands here twice; the first is Network.interfaces[0]`},
		{"address on a pattern", doc("Network", "interfaces:\n- name: en*\n  addresses: [10.0.0.3/24]"),
			`n.yaml:4: Network.interfaces[0].name: "en*" is a pattern; addresses and routes need one link's exact name`},
		{"route with host bits", doc("Network", "interfaces:\n- name: eth0\n  routes: [{to: 10.0.0.3/24}]"),
			`n.yaml:5: Network.interfaces[0].routes[0].to: "10.0.0.3/24" has bits set behind the prefix length; the network is "10.0.0.0/24"`},
		{"next hop elsewhere", doc("Network", "interfaces:\n- name: eth0\n  addresses: [10.0.0.3/24]\n  routes: [{to: 0.0.0.0/0, via: 10.0.1.1}]"),
			`n.yaml:6: Network.interfaces[0].routes[0].via: "10.0.1.1" is in no network of "eth0"; add an address of its network, or a route to it without via`},
		{"subnets overlap", doc("Kubernetes", "serviceSubnet: 10.244.0.0/20"),
			`n.yaml:3: Kubernetes.serviceSubnet: "10.244.0.0/20" overlaps with podSubnet "10.244.0.0/16"`},
		{"subnet too small", doc("Kubernetes", "podSubnet: 10.244.0.0/25"),
			`n.yaml:3: Kubernetes.podSubnet: "10.244.0.0/25" is not within what is allowed: an IPv4 network like "10.244.0.0/16", from /8 to /24`},
		{"address in the pods' subnet", doc("Network", "interfaces:\n- name: eth0\n  addresses: [10.244.0.3/24]"),
			`n.yaml:5: Network.interfaces[0].addresses[0]: "10.244.0.3/24" overlaps with Kubernetes.podSubnet "10.244.0.0/16"; set one of them to a network that is free`},
		{"virtual address of pods", doc("Cluster", "virtualIPs: [10.244.0.9]"),
			`n.yaml:3: Cluster.virtualIPs[0]: "10.244.0.9" is among the addresses of pods (10.244.0.0/16) or Services (10.96.0.0/16); it must be one of the nodes' network`},
		{"two virtual addresses of a family", doc("Cluster", "virtualIPs: [10.0.0.9, 10.0.0.10]"),
			`n.yaml:3: Cluster.virtualIPs[1]: "10.0.0.10" is a second one of its family; the first is Cluster.virtualIPs[0]`},
		{"virtual address of this machine", doc("Cluster", "virtualIPs: [10.0.0.9]") + "---\n" + doc("Network", "interfaces:\n- name: eth0\n  addresses: [10.0.0.9/24]"),
			`n.yaml:3: Cluster.virtualIPs[0]: "10.0.0.9" is an address of this machine (Network.interfaces[0]); a virtual one belongs to none for good`},
		{"virtual address of one link", doc("Cluster", "virtualIPs: [fe80::1]"),
			`n.yaml:3: Cluster.virtualIPs[0]: "fe80::1" is of one link only; allowed: an address like "10.0.0.100" that no machine has`},
		{"worker without endpoint", doc("Cluster", "name: a") + "---\n" + doc("Machine", "role: worker"),
			`n.yaml:1: Cluster.endpoint: is missing; a worker (Machine.role) needs a URL like "https://10.0.0.5:6443"`},
		{"endpoint", doc("Cluster", "endpoint: http://a:1"), `n.yaml:3: Cluster.endpoint: "http://a:1" is not valid; allowed: a URL like "https://10.0.0.5:6443"`},
		{"all problems", doc("Machine", "hostname: A\nrole: x"),
			"n.yaml:3: Machine.hostname: \"A\" is not valid; allowed: lower-case letters, digits, - and . as in RFC 1123, at most 63 characters\n" +
				"n.yaml:4: Machine.role: \"x\" is unknown; allowed: controlplane, worker"},
		{"not UTF-8", "kind: a\nb: \xff", "n.yaml:2: byte 0xff is not UTF-8; save the text as UTF-8"},
		{"too long", strings.Repeat("#", MaxSize+1), "n.yaml: 1048577 bytes; at most 1048576 are allowed"},
		{"too many nodes", "a: [" + strings.Repeat(",", maxMarks) + "]", "n.yaml: more than 50000 lines, list entries and fields"},
		{"not YAML", "kind: [", "n.yaml:1: not YAML: did not find expected node content"},
		{"too many documents", strings.Repeat("---\n", 70), "n.yaml: more than 63 documents"},
	} {
		s, err := Parse("n.yaml", []byte(c.in))
		if err == nil {
			t.Errorf("%s: accepted as %+v\ninput:\n%s", c.name, s, c.in)
			continue
		}
		if got := err.Error(); got != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s\ninput:\n%s", c.name, got, c.want, c.in)
		}
		if s != (Set{}) {
			t.Errorf("%s: a set came back with the error", c.name)
		}
	}
}

func TestProblemsAreBounded(t *testing.T) {
	_, err := Parse("n.yaml", []byte(doc("Machine", strings.Repeat("x: 1\n", 50))))
	var e *Error
	if !errors.As(err, &e) || len(e.Problems) != maxProblems || e.More != 50-maxProblems {
		t.Fatalf("got %v", err)
	}
	if !strings.HasSuffix(err.Error(), "\nand 30 more") {
		t.Errorf("got %s", err)
	}
}

func TestEmptyIsValid(t *testing.T) {
	for _, in := range []string{"", "\n", "# nothing\n", "---\n---\n", "\ufeff"} {
		s, err := Parse("", []byte(in))
		if err != nil || !reflect.DeepEqual(s, Defaults()) {
			t.Errorf("%q: got %+v, %v", in, s, err)
		}
	}
}

func TestParseFull(t *testing.T) {
	s, err := Parse("full.yaml", full(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(Marshal(s)); got != string(full(t)) {
		t.Errorf("got\n%s", got)
	}
	if err := Validate(s); err != nil {
		t.Errorf("a parsed set is not valid: %v", err)
	}
	if e := s.Network.Interfaces[0]; e.MTU != 1400 || len(e.Addresses) != 2 || e.Routes[0].Metric != 5 || *s.Kubernetes.Schedulable {
		t.Errorf("got %+v", e)
	}
}

func TestSectionStandsAlone(t *testing.T) {
	s, err := Parse("full.yaml", full(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, kinds := range [][]Kind{
		{KindStorage}, {KindMachine, KindCluster}, {KindMachine, KindCluster, KindKubernetes},
		{KindMachine, KindNetwork, KindCluster, KindKubernetes}, {KindUpdate}, {KindMachine, KindCluster, KindAccess},
	} {
		got, err := Parse("", Section(s, kinds...))
		if err != nil {
			t.Errorf("%v: %v", kinds, err)
			continue
		}
		for _, k := range kinds {
			if !reflect.DeepEqual(got.slot(k).Interface(), s.slot(k).Interface()) {
				t.Errorf("%v: %s got %+v", kinds, k, got.slot(k))
			}
		}
	}
}

// FuzzParse: whatever comes, no panic; what is taken is written and read back the same, and is valid.
func FuzzParse(f *testing.F) {
	f.Add(full(f))
	f.Add([]byte(doc("Machine", "hostname: a")))
	f.Add([]byte(doc("Storage", "disk: \"/dev/disk/by-id/no: #\"\nstateSize: 64MiB")))
	f.Add([]byte(doc("Network", "interfaces: [{name: '*'}, {name: '-'}, {name: '1e3'}]\nfirewall: {allow: [{port: 1}]}\nsearchDomains: [\"on\", \"0x1\", \"null\"]")))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte(strings.Repeat("[", 30)))
	testfuzz.Run(f, func(t *testing.T, in []byte) {
		s, err := Parse("f", in)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without text")
			}
			return
		}
		out := Marshal(s)
		again, err := Parse("again", out)
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Fatalf("got %v, wrote\n%s\nread %+v, want %+v", err, out, again, s)
		}
		if err := Validate(s); err != nil {
			t.Fatalf("parsed, but not valid: %v", err)
		}
		if d := Diff(s, again); d != nil {
			t.Fatalf("equal sets differ: %v", d)
		}
	})
}
