package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path"
	"slices"
	"strings"
)

// stage1 is what the initramfs loads. First what a boot that fails needs: the hardware watchdog, which ends one that hangs, and
// where the kernel's last lines are kept, in the firmware's variables or, where there are none, in memory that a restart spares.
// Then what leads to the root: the firmware's variables, which say which disk was started from, the disk, its verification, its file system. NVMe, ext4 and virtio's PCI transport are built into
// Debian's cloud kernel, and so are the records of a server's own hardware (ERST).
var stage1 = []string{"i6300esb", "wdat_wdt", "efi_pstore", "ramoops", "efivarfs", "virtio_blk", "dm_verity", "squashfs"}

// withoutUEFI are those of stage 1 that PID 1 loads only where there is no such firmware. They stand behind the list's empty line.
var withoutUEFI = map[string]bool{"ramoops": true}

// moduleParams are the parameters that PID 1 gives a module of stage 1.
var moduleParams = map[string]string{
	"ramoops": "mem_name=oops record_size=65536 console_size=0 ftrace_size=0 pmsg_size=0",
}

// stage2 is loaded by PID 1 from the root, in this order. There is no modprobe on a node, so everything that somebody
// may ask for is here. What the daemons and networkd's firewall need comes first: encrypted volumes, too.
// The rest is for the EFI partition, which only upgrades mount, for Kubernetes and for configured links. An empty line of the list stands between the two: PID 1 loads the rest when the light daemons are up, and starts the
// heavy ones, which start what needs it, after that.
var stage2 = struct{ early, late []string }{
	early: []string{
		"qemu_fw_cfg", "virtio_net", "virtio_rng", "i6300esb",
		"dm_crypt", "xts", "aesni_intel",
		"nf_tables", "nft_compat", "nf_conntrack", "xt_conntrack", "xt_tcpudp",
	},
	late: []string{
		"vfat", "nls_cp437", "nls_ascii",
		"overlay", "br_netfilter", "bridge", "veth",
		"nft_limit", "nft_log", "nf_log_syslog", "xt_comment", "xt_mark", "xt_addrtype", "xt_multiport", "xt_limit", "xt_LOG", "ipt_REJECT", "ip6t_REJECT",
		"nf_nat", "nft_ct", "nft_chain_nat", "nft_nat", "nft_masq", "nft_redir", "nft_reject", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6",
		"nft_fib", "nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6", "nft_numgen", "nft_hash", "nft_quota", "nf_conntrack_netlink",
		"xt_connmark", "xt_nat", "xt_MASQUERADE", "xt_REDIRECT", "xt_statistic", "xt_set", "xt_TCPMSS",
		"dummy", "vxlan", "8021q", "bonding",
	},
}

// A module is one kernel module, uncompressed. Its name has underscores where its file may have dashes.
type module struct {
	name    string
	path    string // below the folder of the release: kernel/net/bridge/bridge.ko
	depends []string
	data    []byte
}

func moduleName(file string) string {
	base := path.Base(file)
	base, _, _ = strings.Cut(base, ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// modinfo reads what a module says about itself: NUL-separated key=value pairs in section .modinfo.
func modinfo(data []byte) (name string, depends []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return "", nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return "", nil, fmt.Errorf("no section .modinfo")
	}
	b, err := s.Data()
	if err != nil {
		return "", nil, err
	}
	for pair := range strings.SplitSeq(string(b), "\x00") {
		switch k, v, _ := strings.Cut(pair, "="); k {
		case "name":
			name = v
		case "depends":
			for d := range strings.SplitSeq(v, ",") {
				if d != "" {
					depends = append(depends, strings.ReplaceAll(d, "-", "_"))
				}
			}
		}
	}
	return name, depends, nil
}

// moduleSet finds modules by name. load unpacks one; builtin has the names of those that are part of the kernel.
type moduleSet struct {
	load    func(name string) (module, bool, error)
	builtin map[string]bool
}

// order returns the wanted modules and all that they depend on, each after its dependencies and otherwise in the
// order wanted. Modules in loaded, and those built into the kernel, are left out.
func (s moduleSet) order(want []string, loaded map[string]bool) ([]module, error) {
	var out []module
	done := map[string]bool{}
	var visit func(name string, from []string) error
	visit = func(name string, from []string) error {
		if done[name] || loaded[name] || s.builtin[name] {
			return nil
		}
		if slices.Contains(from, name) {
			return fmt.Errorf("module %s depends on itself through %s", name, strings.Join(from, " "))
		}
		m, ok, err := s.load(name)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		if !ok {
			return fmt.Errorf("module %s, wanted by %s, is not in the kernel's package", name, strings.Join(append([]string{"the image"}, from...), " "))
		}
		for _, d := range m.depends {
			if err := visit(d, append(from, name)); err != nil {
				return err
			}
		}
		done[name] = true
		out = append(out, m)
		return nil
	}
	for _, name := range want {
		if err := visit(name, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
}
