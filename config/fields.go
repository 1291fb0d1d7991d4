package config

import (
	"encoding/hex"
	"math"
	"net"
	"net/netip"
	"net/url"
	"path"
	"reflect"
	"strconv"
	"strings"
)

// A field says what one field may hold, apart from its Go type. Messages, the JSON Schema and docs/config.md come from here.
type field struct {
	doc      string            // one sentence for people
	standard string            // the default, as people would write it; "" if there is none
	required bool              // it must be written
	some     bool              // of a mapping: at least one of its fields must be written
	oneOf    []string          // the only values there are
	min, max int64             // of a number or, in bytes, of a size; both 0: no limit
	zero     bool              // 0 is fine too, whatever min says
	ok       func(string) bool // whether a string is fine; nil: every string that is not empty
	allowed  string            // what is allowed, for messages, where oneOf, min and max do not say it
	pattern  string            // the same as ok for the JSON Schema, as near as a pattern can be
	most     int               // of a list's entries; 0: maxList
}

// maxList bounds every list that has no bound of its own.
const maxList = 256

const (
	labelPattern  = `^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`
	domainPattern = `^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	prefixText    = `a network like "10.0.0.0/8" or "2001:db8::/32", no bits set behind the prefix length`
)

// fields has every field's rule; the key is its path without list indexes.
var fields = map[string]field{
	"Machine": {doc: "The node by itself."},
	"Machine.hostname": {doc: "The node's name, in Kubernetes too.", standard: "bulkhead- and six random digits, made once and kept", ok: isHostname,
		allowed: "lower-case letters, digits, - and . as in RFC 1123, at most 63 characters", pattern: domainPattern},
	"Machine.role": {doc: "What the node does in the cluster.", standard: "controlplane", oneOf: []string{"controlplane", "worker"}},

	"Network":                 {doc: "Links, addresses, routes, names and the firewall."},
	"Network.interfaces":      {doc: "Links. None: DHCP on every physical one.", most: 64},
	"Network.interfaces.name": {doc: "Exact (eth0) or a pattern with * (en*).", required: true, ok: isLinkName, allowed: `a name like "eth0" or a pattern like "en*", at most 15 characters`, pattern: `^[-A-Za-z0-9_.*:@]{1,15}$`},
	"Network.interfaces.dhcp": {doc: "Ask for an IPv4 lease; static addresses may stand beside it.", standard: "false"},
	"Network.interfaces.mtu":  {doc: "In bytes; 0 leaves the driver's.", standard: "0", min: 68, max: 65535, zero: true},
	"Network.interfaces.addresses": {doc: "Static addresses with their prefix length.", most: 64,
		allowed: `an address with its prefix length like "10.0.0.3/24"`},
	"Network.interfaces.routes":        {doc: "Static routes over this link.", most: 256},
	"Network.interfaces.routes.to":     {doc: "Destination; 0.0.0.0/0 is the default route.", required: true, allowed: prefixText},
	"Network.interfaces.routes.via":    {doc: "Next hop. None: the destination is on the link.", allowed: `an address like "10.0.0.1"`},
	"Network.interfaces.routes.metric": {doc: "The route with the lowest wins.", standard: "0", max: math.MaxUint32},
	"Network.nameservers":              {doc: "Asked before those from DHCP.", most: 8, allowed: `an address like "10.0.0.1"`},
	"Network.searchDomains":            {doc: "Appended to short names, in order.", most: 16, ok: isDomain, allowed: `a domain like "example.org"`, pattern: domainPattern},
	"Network.firewall":                 {doc: "What may come in; all that is not allowed is dropped. The node's own ports are open to everybody unless a rule names them."},
	"Network.firewall.allow":           {doc: "Ports that are open.", most: 256},
	"Network.firewall.allow.port":      {doc: "The port.", required: true, min: 1, max: 65535},
	"Network.firewall.allow.protocol":  {doc: "The protocol.", standard: "tcp", oneOf: []string{"tcp", "udp"}},
	"Network.firewall.allow.from":      {doc: "Who may. None: everybody.", allowed: prefixText},

	"Storage": {doc: "The disk that STATE and VAR live on."},
	"Storage.disk": {doc: "A device, or system: the disk that the running system was started from.", standard: "system", ok: isDisk,
		allowed: `"system" or a device like "/dev/vda"`, pattern: `^(system|/dev/[^ ]+)$`},
	"Storage.wipe":       {doc: "Allow foreign data on that disk, and only that, to be destroyed.", standard: "false"},
	"Storage.filesystem": {doc: "Of STATE and VAR.", standard: "ext4", oneOf: []string{"ext4"}},
	"Storage.stateSize":  {doc: "Of STATE; VAR takes the rest, at least 2GiB.", standard: "256MiB", min: 64 << 20, max: 64 << 30, pattern: `^[1-9][0-9]*(KiB|MiB|GiB|TiB)$`},
	"Storage.encryption": {doc: "Of STATE and VAR, when they are made: luks2, none, or auto: luks2 if there is a TPM 2.0 and the image is signed for it.", standard: "auto", oneOf: []string{"auto", "none", "luks2"}},
	"Storage.keys":       {doc: "What opens STATE at boot, besides the recovery key. None: the TPM, if it can.", most: 8},
	"Storage.keys.kind":  {doc: "What the key comes from.", required: true, oneOf: []string{"tpm", "keyFile", "kms", "passphrase"}},
	"Storage.keys.partition": {doc: "For keyFile: a partition's name; the key is its first 4096 bytes.", ok: isPartitionName,
		allowed: `a name like "KEY", at most 36 characters, and none of Bulkhead's own`, pattern: `^[A-Za-z0-9_.-]{1,36}$`},
	"Storage.keys.firmware": {doc: "For keyFile: a file of QEMU's fw_cfg; the key is all of it.", ok: isFirmwareFile,
		allowed: `a name like "opt/org.example/key", at most 55 characters`, pattern: `^opt/[A-Za-z0-9_./-]{1,51}$`},
	"Storage.keys.address": {doc: "For kms: host and port of the key service.", ok: isHostPort, allowed: `a host and port like "10.0.0.9:4050"`, pattern: `^[^ /]+:[0-9]+$`},
	"Storage.keys.pin":     {doc: "For kms: digest of the public key in the server's certificate.", ok: isPin, allowed: `"sha256:" and 64 hex digits`, pattern: `^sha256:[0-9a-f]{64}$`},
	"Storage.install":      {doc: "Copy the system from the medium that the machine was started from to a disk, and put STATE and VAR there. A machine that runs from its own disk is not changed."},
	"Storage.install.disk": {doc: "What the disk is like: all of it must hold, of exactly one disk. In texts, * stands for any characters.", required: true, some: true,
		allowed: "a mapping with at least one of device, transport, model, serial, wwn, size"},
	"Storage.install.disk.device":    {doc: "Its name, which may be another one after a restart.", ok: isDevice, allowed: `a device like "/dev/sda"`, pattern: `^/dev/[^ ]+$`},
	"Storage.install.disk.transport": {doc: "What it is attached by.", oneOf: []string{"nvme", "sata", "scsi", "virtio", "mmc", "usb", "xen"}},
	"Storage.install.disk.model":     {doc: "What it says that it is.", ok: isShown, allowed: `printable characters like "Samsung SSD 980*", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Storage.install.disk.serial":    {doc: "Its serial number.", ok: isShown, allowed: `printable characters like "S649N*", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Storage.install.disk.wwn":       {doc: "Its name that no other disk has.", ok: isShown, allowed: `printable characters like "eui.0025385b21404321", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Storage.install.disk.size": {doc: "One comparison (<, <=, =, >=, >), or two.", ok: isComparison, allowed: `a comparison like ">= 100GiB" or "> 100GiB, < 2TiB"`,
		pattern: `^ *(<|<=|=|>=|>) *[1-9][0-9]*(KiB|MiB|GiB|TiB) *(, *(<|<=|=|>=|>) *[1-9][0-9]*(KiB|MiB|GiB|TiB) *)?$`},

	"Cluster":      {doc: "What all nodes of a cluster agree on."},
	"Cluster.name": {doc: "The cluster's name.", standard: "bulkhead", ok: isLabel, allowed: "lower-case letters, digits and -, at most 63 characters", pattern: labelPattern},
	"Cluster.endpoint": {doc: "The URL under which clients and workers reach the API server.", standard: "the node's own first address", ok: isEndpoint,
		allowed: `a URL like "https://10.0.0.5:6443"`, pattern: `^https://[^/?#@ ]+$`},
	"Cluster.names": {doc: "Further names and addresses in the server certificates.", most: 64, ok: isName, allowed: `a name like "node.example.org" or an address like "10.0.0.5"`},
	"Cluster.virtualIPs": {doc: "Addresses of the API server that move to another control plane when the one that has them fails; one of each family at most, in a network that all control planes are in.", most: 2,
		allowed: `an address like "10.0.0.100" that no machine has`},
	"Cluster.etcd":                 {doc: "How the members care for the cluster's data."},
	"Cluster.etcd.snapshots":       {doc: "Snapshots of the whole database that each control plane makes on its own disk."},
	"Cluster.etcd.snapshots.every": {doc: "Hours between two; 0 makes none.", standard: "6", min: 1, max: 168, zero: true},
	"Cluster.etcd.snapshots.keep":  {doc: "How many stay, the newest.", standard: "5", min: 1, max: 100},

	"Kubernetes":               {doc: "The cluster's Kubernetes."},
	"Kubernetes.podSubnet":     {doc: "Addresses of pods; a node gets a /24 of it.", standard: "10.244.0.0/16", allowed: `an IPv4 network like "10.244.0.0/16", from /8 to /24`},
	"Kubernetes.serviceSubnet": {doc: "Addresses of Services; the first is the API server's, the tenth is DNS.", standard: "10.96.0.0/16", allowed: `an IPv4 network like "10.96.0.0/16", from /12 to /28`},
	"Kubernetes.domain":        {doc: "The DNS domain of the cluster.", standard: "cluster.local", ok: isDomain, allowed: `a domain like "cluster.local"`, pattern: domainPattern},
	"Kubernetes.cni":           {doc: "The pod network: built in, or none to bring one.", standard: "bridge", oneOf: []string{"bridge", "none"}},
	"Kubernetes.schedulable":   {doc: "Whether pods run on control-plane nodes too.", standard: "true"},
	"Kubernetes.podSecurity":   {doc: "The default Pod Security level.", standard: "baseline", oneOf: []string{"baseline", "restricted", "privileged"}},

	"Update": {doc: "When a new version of the system is good."},
	"Update.health": {doc: "What it must prove, all of it.", standard: "all of these, but etcd on workers", most: 5,
		oneOf: []string{"api", "services", "config", "etcd", "kubelet"}},
	"Update.patience": {doc: "Minutes that it has, before the machine restarts for its next try, or for the old version after the last. A try after one that had them all gets two.", standard: "10", min: 1, max: 1440},

	"Access":       {doc: "Who may do what: roles of your own, and people who sign in at an OpenID Connect issuer. The same on every node of a cluster."},
	"Access.roles": {doc: "Roles of your own, beside admin, operator, reader and etcd-backup.", most: 64},
	"Access.roles.name": {doc: "What credentials and bindings call it.", required: true, ok: isRoleName,
		allowed: "lower-case letters, digits and -, at most 63 characters, and no role that there is without it", pattern: labelPattern},
	"Access.roles.allow": {doc: "Methods that it may call, as SERVICE/METHOD; * stands for any characters but /.", required: true, most: 64, ok: isMethodPattern,
		allowed: `SERVICE/METHOD with * for any characters, like "machine.v1.Machine/Get*"`, pattern: `^/?[A-Za-z0-9_.*]+/[A-Za-z0-9_*]+$`},
	"Access.roles.nodes": {doc: "On which nodes. None: on all.", some: true, allowed: "a mapping with names or roles"},
	"Access.roles.nodes.names": {doc: "Their names; * stands for any characters.", most: 256, ok: isNodePattern,
		allowed: `a node's name like "w1", or a pattern like "w*"`, pattern: `^[a-z0-9.*-]{1,63}$`},
	"Access.roles.nodes.roles": {doc: "What they do in the cluster.", most: 2, oneOf: []string{"controlplane", "worker"}},
	"Access.bindings":          {doc: "Which roles people have who sign in at the issuer."},
	"Access.bindings.role":     {doc: "One of roles, or admin, operator, reader, etcd-backup.", required: true, ok: isLabel, allowed: "a name in roles, or admin, operator, reader, etcd-backup"},
	"Access.bindings.users": {doc: "Who has it: the value of usernameClaim, after usernamePrefix.", ok: isShown,
		allowed: `printable characters like "oidc:ann@example.org", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Access.bindings.groups": {doc: "Whose members have it: a value of groupsClaim, after groupsPrefix.", ok: isShown,
		allowed: `printable characters like "oidc:platform", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Access.oidc":          {doc: "The OpenID Connect issuer whose ID tokens are taken. None: there is none."},
	"Access.oidc.issuer":   {doc: "Its URL, as in its tokens.", required: true, ok: isIssuer, allowed: `a URL like "https://login.example.org/realm"`, pattern: `^https://[^?#@ ]+$`},
	"Access.oidc.clientID": {doc: "What this cluster is called there; bhctl login uses it. A public client: it has no secret.", required: true, ok: isShown, allowed: `printable characters like "bulkhead", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Access.oidc.audience": {doc: "For whom tokens must be (claim aud), if not for clientID.", standard: "clientID", ok: isShown, allowed: `printable characters like "bulkhead", at most 128`, pattern: `^[ -~]{1,128}$`},
	"Access.oidc.usernameClaim": {doc: "The claim with the person's name. With email, a token that says email_verified: false is refused.", standard: "sub", ok: isShown,
		allowed: `a claim like "email"`, pattern: `^[ -~]{1,128}$`},
	"Access.oidc.groupsClaim": {doc: "The claim with the names of the person's groups.", standard: "groups", ok: isShown, allowed: `a claim like "groups"`, pattern: `^[ -~]{1,128}$`},
	"Access.oidc.usernamePrefix": {doc: "Before names, so that nobody's is that of a certificate, a token or a node.", standard: "oidc:", ok: isPrefix,
		allowed: `letters, digits, -, _ and . with : behind them, like "oidc:", and not "node:"`, pattern: `^[A-Za-z0-9_.-]{1,32}:$`},
	"Access.oidc.groupsPrefix": {doc: "Before names of groups.", standard: "oidc:", ok: isPrefix,
		allowed: `letters, digits, -, _ and . with : behind them, like "oidc:", and not "node:"`, pattern: `^[A-Za-z0-9_.-]{1,32}:$`},
	"Access.oidc.ca": {doc: "Authorities (PEM) that the issuer's certificate must be signed by.", standard: "those that browsers know", ok: isAuthorities, allowed: "certificates in PEM, at most 64 KiB"},
}

// rule returns the rule of a path with or without list indexes.
func rule(at string) field {
	var b strings.Builder
	for in := at; ; {
		before, after, more := strings.Cut(in, "[")
		b.WriteString(before)
		if !more {
			return fields[b.String()]
		}
		_, in, _ = strings.Cut(after, "]")
	}
}

// permits says what is allowed.
func (f field) permits() string {
	switch {
	case f.oneOf != nil:
		return strings.Join(f.oneOf, ", ")
	case f.allowed != "":
		return f.allowed
	case f.max != 0 && f.zero:
		return "0, or " + strconv.FormatInt(f.min, 10) + " to " + strconv.FormatInt(f.max, 10)
	case f.max != 0:
		return strconv.FormatInt(f.min, 10) + " to " + strconv.FormatInt(f.max, 10)
	}
	return ""
}

// check returns what is wrong with a scalar; "" if nothing is.
func (f field) check(v reflect.Value) string {
	bad := func(text, why string) string {
		allowed := f.permits()
		if v.Type() == sizeType {
			allowed = Size(f.min).String() + " to " + Size(f.max).String()
		}
		return text + " " + why + "; allowed: " + allowed
	}
	switch x := v.Interface().(type) {
	case Size:
		if x < Size(f.min) || x > Size(f.max) {
			return bad(x.String(), "is out of range")
		}
		if x%(1<<20) != 0 {
			return bad(x.String(), "is not a multiple of 1MiB")
		}
	case int:
		if n := int64(x); (n < f.min || n > f.max) && !(f.zero && n == 0) {
			return bad(strconv.Itoa(x), "is out of range")
		}
	case netip.Addr, netip.Prefix, bool:
		return "" // the type has checked it
	default:
		if v.Kind() != reflect.String {
			return ""
		}
		s := v.String()
		if f.oneOf != nil {
			for _, o := range f.oneOf {
				if s == o {
					return ""
				}
			}
			if n := Nearest(s, f.oneOf); n != "" {
				return bad(found(s), "is unknown, nearest is "+n)
			}
			return bad(found(s), "is unknown")
		}
		if s == "" {
			return bad(found(s), "is empty")
		}
		if f.ok != nil && !f.ok(s) {
			return bad(found(s), "is not valid")
		}
	}
	return ""
}

// isLabel: one RFC 1123 label in lower case, as Kubernetes wants it.
func isLabel(s string) bool {
	if len(s) < 1 || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}

func isDomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for l := range strings.SplitSeq(s, ".") {
		if !isLabel(l) {
			return false
		}
	}
	return true
}

// isHostname: 63 is what fits a Kubernetes label value and Linux' host name.
func isHostname(s string) bool {
	_, err := netip.ParseAddr(s)
	return len(s) <= 63 && isDomain(s) && err != nil && s != "localhost"
}

func isName(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() == "" || err != nil && isDomain(s)
}

// isLinkName: what Linux takes as a link's name, and * as in a pattern.
func isLinkName(s string) bool {
	if len(s) < 1 || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.*:@", c) >= 0) {
			return false
		}
	}
	return true
}

func isDisk(s string) bool { return s == "system" || isDevice(s) }

func isDevice(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return strings.HasPrefix(s, "/dev/") && path.Clean(s) == s && len(s) <= 255
}

// isShown: what a device says of itself, as it is shown.
func isShown(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= 128 && strings.TrimSpace(s) == s
}

func isComparison(s string) bool {
	_, err := ParseComparisons(s)
	return err == nil
}

// isPartitionName: Bulkhead's own partitions hold no keys.
func isPartitionName(s string) bool {
	switch s {
	case "ESP", "ROOT-A", "VERITY-A", "ROOT-B", "VERITY-B", "STATE", "VAR":
		return false
	}
	return len(s) <= 36 && only(s, "_.-")
}

// isFirmwareFile: what users may add to fw_cfg lies below opt/; a path must not lead out of it.
func isFirmwareFile(s string) bool {
	return strings.HasPrefix(s, "opt/") && len(s) <= 55 && path.Clean(s) == s && len(s) > len("opt/") && only(s, "_./-")
}

// only reports whether a text has letters, digits and these characters only, and is not empty.
func only(s, others string) bool {
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(others, c) >= 0) {
			return false
		}
	}
	return s != ""
}

func isHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || len(s) > 255 {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && strconv.FormatUint(n, 10) == port && isName(host)
}

func isPin(s string) bool {
	digest, ok := strings.CutPrefix(s, "sha256:")
	raw, err := hex.DecodeString(digest)
	return ok && err == nil && len(raw) == 32 && strings.ToLower(digest) == digest
}

func isEndpoint(s string) bool {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || len(s) > 255 {
		return false
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	return isName(u.Hostname()) && "https://"+u.Host == s && !strings.HasSuffix(s, ":")
}
