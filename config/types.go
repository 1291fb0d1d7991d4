package config

import "net/netip"

// APIVersion is the only version of documents that this program reads.
const APIVersion = "bulkhead.dev/v1"

// Kind names a document's kind.
type Kind string

// The kinds there are, in the order in which they are written.
const (
	KindMachine    Kind = "Machine"
	KindNetwork    Kind = "Network"
	KindStorage    Kind = "Storage"
	KindCluster    Kind = "Cluster"
	KindKubernetes Kind = "Kubernetes"
	KindUpdate     Kind = "Update"
	KindAccess     Kind = "Access"
)

// Set is a whole configuration: at most one document of each kind. A kind that was not
// written has its defaults (see Defaults), so no field is nil after Parse.
type Set struct {
	Machine    *Machine
	Network    *Network
	Storage    *Storage
	Cluster    *Cluster
	Kubernetes *Kubernetes
	Update     *Update
	Access     *Access
}

// Role says what a node does in the cluster.
type Role string

const (
	ControlPlane Role = "controlplane" // runs etcd and the control plane, and pods too (Kubernetes.schedulable)
	Worker       Role = "worker"
)

// Machine is the node by itself.
type Machine struct {
	// Hostname is also the Kubernetes node's name. RFC 1123 label(s), at most 63 characters.
	// Default: "bulkhead-" and six random digits; machined makes them at the first apply and keeps them, Parse leaves it "".
	Hostname string `yaml:"hostname,omitempty"`
	// Role defaults to controlplane.
	Role Role `yaml:"role,omitempty"`
}

// Network is links, addresses, routes, names and the firewall.
type Network struct {
	// Interfaces: none means DHCP on every physical one; Parse leaves the list empty then, networkd knows the links.
	Interfaces    []Interface  `yaml:"interfaces,omitempty"`
	Nameservers   []netip.Addr `yaml:"nameservers,omitempty"` // before those from DHCP
	SearchDomains []string     `yaml:"searchDomains,omitempty"`
	Firewall      Firewall     `yaml:"firewall,omitempty"`
}

// LinkName is a network interface's name, for example "eth0".
type LinkName string

// Interface is one link.
type Interface struct {
	// Name is exact ("eth0") or a pattern with * ("en*"). Required.
	Name LinkName `yaml:"name"`
	// DHCP asks for an IPv4 lease. It may stand beside static addresses.
	DHCP bool `yaml:"dhcp,omitempty"`
	// MTU in bytes, 68 to 65535; 0 leaves the driver's.
	MTU       int            `yaml:"mtu,omitempty"`
	Addresses []netip.Prefix `yaml:"addresses,omitempty"`
	Routes    []Route        `yaml:"routes,omitempty"`
}

// Route is one static route over its interface.
type Route struct {
	To     netip.Prefix `yaml:"to"`            // required
	Via    netip.Addr   `yaml:"via,omitempty"` // none: on link
	Metric int          `yaml:"metric,omitempty"`
}

// Firewall is the ingress policy: what is not allowed is dropped. Established connections, loopback, ICMP and
// pod traffic are always allowed, and so are the node's own ports from anywhere unless a rule here names the port.
type Firewall struct {
	Allow []Allow `yaml:"allow,omitempty"`
}

// Allow opens a port.
type Allow struct {
	Port     int            `yaml:"port"`               // 1 to 65535
	Protocol string         `yaml:"protocol,omitempty"` // "tcp" (default) or "udp"
	From     []netip.Prefix `yaml:"from,omitempty"`     // none: anywhere
}

// Storage is the disk that STATE and VAR live on.
type Storage struct {
	// Disk is a device ("/dev/vda") or "system" (default): the disk that the running system was started from.
	Disk string `yaml:"disk,omitempty"`
	// Wipe allows foreign data on the disk, and only that, to be destroyed. It never touches a Bulkhead volume.
	Wipe bool `yaml:"wipe,omitempty"`
	// Filesystem of STATE and VAR: "ext4" (default).
	Filesystem string `yaml:"filesystem,omitempty"`
	// StateSize of STATE; default 256MiB, at least 64MiB. VAR takes the rest, at least 2GiB.
	StateSize Size `yaml:"stateSize,omitempty"`
	// Encryption of STATE and VAR. It counts when they are made; what is there already stays as it is. Default: auto.
	Encryption Encryption `yaml:"encryption,omitempty"`
	// Keys are what opens STATE at boot (VAR's key lies on STATE), besides the recovery key, which there always is. None: the TPM, if
	// there is one that can.
	Keys []StorageKey `yaml:"keys,omitempty"`
	// Install copies the system from the medium that the machine was started from to a disk, which STATE and VAR then are on, too. A machine that
	// runs from its own disk is not changed by it. The zero value installs nothing.
	Install Install `yaml:"install,omitempty"`
}

// Install says where the system is to be installed.
type Install struct {
	// Disk chooses the disk: exactly one must match. Required.
	Disk DiskSelector `yaml:"disk"`
}

// Wanted reports whether there is anything to install.
func (i Install) Wanted() bool { return i != Install{} }

// DiskSelector says what a disk must be like; all that is written must hold. In texts, * stands for any characters.
type DiskSelector struct {
	// Device is a name like "/dev/sda". It may be another one after a restart.
	Device string `yaml:"device,omitempty"`
	// Transport is "nvme", "sata", "scsi", "virtio", "mmc", "usb" or "xen".
	Transport string `yaml:"transport,omitempty"`
	Model     string `yaml:"model,omitempty"`
	Serial    string `yaml:"serial,omitempty"`
	WWN       string `yaml:"wwn,omitempty"`
	// Size is one or two comparisons: ">= 100GiB", "> 100GiB, < 2TiB". See ParseComparisons.
	Size string `yaml:"size,omitempty"`
}

// Encryption says whether volumes are encrypted.
type Encryption string

const (
	// EncryptionAuto is LUKS2 if the machine has a TPM 2.0 and was started with a signed PCR policy, else none.
	EncryptionAuto  Encryption = "auto"
	EncryptionNone  Encryption = "none"
	EncryptionLUKS2 Encryption = "luks2"
)

// KeyKind names what a key comes from.
type KeyKind string

const (
	KeyTPM        KeyKind = "tpm"        // sealed to the TPM
	KeyFile       KeyKind = "keyFile"    // bytes of a partition or of the firmware
	KeyService    KeyKind = "kms"        // a server in the network
	KeyPassphrase KeyKind = "passphrase" // somebody who types: "bhctl storage keys add passphrase", then "bhctl unlock"
)

// StorageKey is one way to open STATE. It says where the key is, never what it is.
type StorageKey struct {
	Kind KeyKind `yaml:"kind"` // required
	// Partition, for keyFile: the name in some disk's partition table. The key is its first 4096 bytes.
	Partition string `yaml:"partition,omitempty"`
	// Firmware, for keyFile: the name of a file of QEMU's fw_cfg. The key is all of it, 32 to 4096 bytes.
	Firmware string `yaml:"firmware,omitempty"`
	// Address, for kms: host and port of the key service.
	Address string `yaml:"address,omitempty"`
	// Pin, for kms: "sha256:" and the digest, in hex, of the public key (SubjectPublicKeyInfo) in the server's certificate.
	Pin string `yaml:"pin,omitempty"`
}

// Size is in bytes; it is written like "256MiB" or "10GiB".
type Size uint64

// Cluster is what all nodes of a cluster agree on.
type Cluster struct {
	// Name defaults to "bulkhead".
	Name string `yaml:"name,omitempty"`
	// Endpoint is the URL under which clients and workers reach the API server, for example
	// "https://10.0.0.5:6443". Default: the node's own first address; Parse leaves it "" then. A worker must have it.
	Endpoint string `yaml:"endpoint,omitempty"`
	// Names are further names and addresses in the server certificates (apid, gateway, API server).
	Names []string `yaml:"names,omitempty"`
	// VirtualIPs are addresses of the API server, one of each family at most, that are on no machine for good: one of the control planes whose
	// API server is well has them. They are in the server certificates, and must be in a subnet that all control planes are in. None: no such address.
	VirtualIPs []netip.Addr `yaml:"virtualIPs,omitempty"`
	// Etcd is how the members care for the cluster's data.
	Etcd Etcd `yaml:"etcd,omitempty"`
}

// Etcd is what can be chosen of etcd.
type Etcd struct {
	// Snapshots are those that each control plane makes by itself.
	Snapshots Snapshots `yaml:"snapshots,omitempty"`
}

// Snapshots says how often each control plane saves the whole database on its own disk.
type Snapshots struct {
	// Every is how many hours lie between two; 0 makes none. 0 to 168; default 6.
	Every *int `yaml:"every,omitempty"`
	// Keep is how many stay, the newest. 1 to 100; default 5.
	Keep int `yaml:"keep,omitempty"`
}

// Kubernetes is the cluster's Kubernetes.
type Kubernetes struct {
	// PodSubnet defaults to 10.244.0.0/16; a node gets a /24 of it.
	PodSubnet netip.Prefix `yaml:"podSubnet,omitempty"`
	// ServiceSubnet defaults to 10.96.0.0/16. Its first address is the API server's Service, its tenth is DNS.
	ServiceSubnet netip.Prefix `yaml:"serviceSubnet,omitempty"`
	// Domain defaults to "cluster.local".
	Domain string `yaml:"domain,omitempty"`
	// CNI is "bridge" (default, built in) or "none" (bring your own).
	CNI string `yaml:"cni,omitempty"`
	// Schedulable says whether pods run on control-plane nodes too; default true.
	Schedulable *bool `yaml:"schedulable,omitempty"`
	// PodSecurity is the default Pod Security level: "baseline" (default), "restricted" or "privileged".
	PodSecurity string `yaml:"podSecurity,omitempty"`
}

// Proof names one thing that a version of the system must prove to be found good.
type Proof string

// The proofs there are.
const (
	ProofAPI      Proof = "api"      // a call with credentials was answered
	ProofServices Proof = "services" // every unit that should run does
	ProofConfig   Proof = "config"   // every daemon has brought about its sections
	ProofEtcd     Proof = "etcd"     // the member answers and has a leader
	ProofKubelet  Proof = "kubelet"  // the node is Ready
)

// Update says when a new version of the system is good.
type Update struct {
	// Health is what must be proved, all of it. Default: everything but etcd on a worker.
	Health []Proof `yaml:"health,omitempty"`
	// Patience is how many minutes a version on trial has, before the machine restarts for its next try, or for the old version after the
	// last. A try after one that had them all gets two. 1 to 1440; default 10.
	Patience int `yaml:"patience,omitempty"`
}
