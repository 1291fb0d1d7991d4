package image

import (
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// packages lists every Debian package that the image takes files from. The lock holds their versions. A library that
// is missing here makes the build fail and name it.
var packages = []string{
	"ca-certificates", "e2fsprogs", "iptables", "libblkid1", "libbsd0", "libc6", "libcom-err2", "libedit2", "libext2fs2t64", "libgmp10",
	"libjansson4", "libmd0", "libmnl0", "libmount1", "libnftables1", "libnftnl11", "libpcre2-8-0", "libselinux1", "libtinfo6", "libuuid1",
	"libxtables12", "linux-image-cloud-amd64", "mount", "nftables", "systemd-boot-efi",
}

const suite = "trixie"

// tools are the programs taken from Debian, by their path on the node. Everything else in their packages stays out.
var tools = []struct{ path, from string }{
	{"/usr/bin/mount", "/usr/bin/mount"},
	{"/usr/bin/umount", "/usr/bin/umount"},
	{"/usr/sbin/e2fsck", "/usr/sbin/e2fsck"},
	{"/usr/sbin/mkfs.ext4", "/usr/sbin/mke2fs"},
	{"/usr/sbin/nft", "/usr/sbin/nft"},
	{"/usr/sbin/resize2fs", "/usr/sbin/resize2fs"},
	{"/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-nft-multi"},
}

// xtablesNames are what xtables-nft-multi is called as.
var xtablesNames = []string{
	"ip6tables", "ip6tables-restore", "ip6tables-save", "ip6tables-nft", "ip6tables-nft-restore", "ip6tables-nft-save",
	"iptables", "iptables-restore", "iptables-save", "iptables-nft", "iptables-nft-restore", "iptables-nft-save",
}

// kubeNames are what the multi-call binary kube is called as.
var kubeNames = []string{"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"}

// inputs is all that the plan of the root depends on.
type inputs struct {
	version string
	debian  debian.Files
	release string            // of the kernel: 6.12.117+deb13-cloud-amd64
	early   []module          // of stage 2, in load order, before the units
	late    []module          // and beside them
	bin     map[string]string // our binaries that exist: init, bulkheadd, ... to the file on the host
	kube    map[string]string // the Kubernetes set: bin/kube, cni/bridge, images.tar, ... to the file on the host
	public  map[string][]byte // keys that the node trusts: release.pub, pcr.pub
	claim   string            // file on the host with the claim key, "" for none
}

// rootTree plans the root. It is pure: equal inputs give an equal tree.
func rootTree(in inputs) (Tree, error) {
	b := newBuilder()
	skeleton(b)
	etc(b, in)
	if err := fromDebian(b, in.debian); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(in.bin)) {
		dest := "/usr/lib/bulkhead/" + name
		if name == "init" {
			dest = "/usr/sbin/init"
		}
		b.host(dest, 0o755, in.bin[name], "bulkhead")
	}
	if err := kubernetes(b, in.kube); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(in.public)) {
		b.file("/usr/share/bulkhead/"+name, 0o644, in.public[name], "keys")
	}
	if in.claim != "" {
		b.host("/usr/share/bulkhead/claim-key", 0o600, in.claim, "claim key")
	}
	dir := "/usr/lib/modules/" + in.release
	var list strings.Builder
	for i, m := range slices.Concat(in.early, in.late) {
		if i == len(in.early) {
			list.WriteString("\n")
		}
		b.file(path.Join(dir, m.path), 0o644, m.data, "kernel")
		fmt.Fprintln(&list, m.path)
	}
	b.file(dir+"/bulkhead.list", 0o644, []byte(list.String()), "mkimage")
	return b.tree()
}

// skeleton has the folders that others mount on, and the links that make /usr the only place of programs.
func skeleton(b *builder) {
	for _, name := range []string{"/bin", "/sbin", "/lib", "/lib64"} {
		b.link(name, "usr"+name)
	}
	for _, name := range []string{"/dev", "/etc", "/mnt", "/opt", "/run", "/usr", "/usr/bin", "/usr/sbin", "/usr/lib/bulkhead", "/var"} {
		b.dir(name, 0o755)
	}
	b.dir("/proc", 0o555)
	b.dir("/sys", 0o555)
	b.dir("/root", 0o700)
	b.dir("/state", 0o700)
	b.dir("/tmp", 0o755) // a tmpfs is mounted on it
	b.link("/opt/cni/bin", "/usr/lib/cni")
	b.dir("/usr/lib/cni", 0o755)
}

func etc(b *builder, in inputs) {
	for name, target := range map[string]string{
		"/etc/machine-id": "/run/bulkhead/etc/machine-id",
		"/etc/hosts":      "/run/bulkhead/networkd/hosts", "/etc/hostname": "/run/bulkhead/networkd/hostname",
		"/etc/resolv.conf": "/run/bulkhead/networkd/resolv.conf",
		"/etc/cni/net.d":   "/run/bulkhead/kubeletd/cni",
		"/etc/kubernetes":  "/run/bulkhead/kubeletd/kubernetes", "/etc/containerd": "/run/bulkhead/kubeletd/containerd",
		"/etc/mtab": "/proc/self/mounts",
	} {
		b.link(name, target)
	}
	text := func(name, s string) { b.file(name, 0o644, []byte(s), "mkimage") }
	text("/etc/os-release", osRelease(in.version))
	text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
	// nft prints a protocol's number where it finds no name, and kube-proxy, when it starts anew, takes what it does not recognise out of the maps of all Services.
	text("/etc/protocols", "icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\nsctp 132 SCTP\n")
	var passwd, group strings.Builder
	for _, name := range uid.Names() {
		id, _ := uid.Lookup(name)
		fmt.Fprintf(&passwd, "%s:x:%d:%d::/:/\n", name, id, id) // no shell exists; "/" cannot be executed
		fmt.Fprintf(&group, "%s:x:%d:\n", name, id)
	}
	text("/etc/passwd", passwd.String())
	text("/etc/group", group.String())
}

func osRelease(version string) string {
	return fmt.Sprintf(`NAME="Bulkhead"
ID=bulkhead
PRETTY_NAME="Bulkhead %[1]s"
VERSION="%[1]s"
VERSION_ID=%[1]s
IMAGE_ID=bulkhead
IMAGE_VERSION=%[1]s
`, version)
}

// fromDebian plans the tools, iptables' plugins, what all of them link with, and the certificates of public authorities.
func fromDebian(b *builder, files debian.Files) error {
	var roots []string
	take := func(dest, from string, perm fs.FileMode) {
		name, f, ok := files.Lookup(from)
		if !ok {
			b.fail(fmt.Errorf("%s is in no package of the lock", name))
			return
		}
		b.add(Entry{Path: dest, Mode: perm, Data: f.Data, From: f.Package + ":" + name})
	}
	for _, t := range tools {
		take(t.path, t.from, 0o755)
		roots = append(roots, t.from)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir, base := path.Split(name)
		if dir != libDir+"/xtables/" || !hasAnyPrefix(base, "libxt_", "libipt_", "libip6t_") || base == "libxt_connlabel.so" { // needs a library and a file of names
			continue
		}
		if target := files[name].Link; target != "" {
			b.link(name, target)
			continue
		}
		take(name, name, 0o644)
		roots = append(roots, name)
	}
	libs, err := closure(files, roots)
	if err != nil {
		return err
	}
	for _, lib := range libs {
		perm := fs.FileMode(0o644)
		if path.Base(lib) == linker {
			perm = 0o755
		}
		take(lib, lib, perm)
	}
	b.link(lib64, "../lib/x86_64-linux-gnu/"+linker)
	for _, name := range xtablesNames {
		b.link("/usr/sbin/"+name, "xtables-nft-multi")
	}
	take("/etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
	b.file("/etc/ssl/certs/ca-certificates.crt", 0o644, authorities(files), "ca-certificates")
	return nil
}

const authorityDir = "/usr/share/ca-certificates/mozilla/"

// authorities joins the certificates of Debian's package, in the order of their names.
func authorities(files debian.Files) []byte {
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasPrefix(name, authorityDir) {
			out = append(out, files[name].Data...)
		}
	}
	return out
}

// kubernetes plans the set that deploy/build-kubernetes.sh makes; an empty one is no error.
func kubernetes(b *builder, set map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(set)) {
		switch dir, base := path.Split(name); {
		case dir == "bin/":
			b.host("/usr/bin/"+base, 0o755, set[name], "kubernetes")
		case dir == "cni/":
			b.host("/usr/lib/cni/"+base, 0o755, set[name], "kubernetes")
		case name == "images.tar":
			b.host("/usr/share/bulkhead/images.tar", 0o644, set[name], "kubernetes")
		default:
			return fmt.Errorf("kubernetes: %s: no place for it is known", name)
		}
	}
	if _, ok := set["bin/kube"]; ok {
		for _, name := range kubeNames {
			b.link("/usr/bin/"+name, "kube")
		}
	}
	return nil
}

// wanted says which files of Debian's packages the plan may look at; the rest is not read into memory.
func wanted(name string) bool {
	return hasAnyPrefix(name, "/usr/lib/", "/usr/sbin/", "/usr/bin/", "/boot/vmlinuz-", authorityDir) || name == "/etc/mke2fs.conf"
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
}
