package kubeletd

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// spec is what of the document matters here.
type spec struct {
	Node                     string // the host's name; "" until it is known
	Role                     config.Role
	Cluster, Domain          string
	Endpoint                 string // URL; "" means the node's own address
	VirtualIPs               []netip.Addr
	PodSubnet, ServiceSubnet netip.Prefix
	CNI, PodSecurity         string
	Schedulable              bool
}

// State is what was read. Addresses and PEM texts are compared as they are; file contents by digest.
type State struct {
	Dir, EtcdAddress, Audit string // where things are on this node: the runtime folder, etcd's host and port, the audit log's folder

	Absent      bool // the image has no Kubernetes
	Volume      bool // VAR is mounted
	Trust       trust
	Address     netip.Addr        // at which other nodes reach this one; zero if there is none
	Hostname    string            // the kernel's, which PID 1 takes from networkd
	Nameservers []netip.Addr      // of the node, without loopback addresses
	Members     map[string]Member // of the cluster, by name; nil while they are not known
	Pods        string            // the podNetwork that networkd has taken, as text

	Pairs  map[string]string // profile: digest of its newest certificate; absent until trustd has signed
	Files  map[string]string // path: digest of content, owner and mode; absent if there is no such file
	Stamps map[string]string // unit: digest of the inputs with which it was last started
	Units  map[string]Unit
	Health map[string]string // unit: "" if it answered well, else what it answered; absent if it was not asked yet

	// Of the authorities while they are replaced; see authorities.go.
	Turn          bool // this control plane may start its units anew
	Published     bool // pods of all namespaces are told Trust.Kubernetes
	KubeletSigned bool // the kubelet shows a certificate of Trust.Signer
	Leftover      bool // extensions of the API are told authorities that count no more

	Etcd bool // its port accepts
	// API says that an API server of the cluster is ready and let kubeletd read. What follows is zero without it, and Peers may be old.
	API       bool
	Node      *Node           // nil: not registered
	Peers     map[string]Peer // all Nodes by name, this one too; nil: not listed yet
	Strangers []string        // those that have belonged to no member of the cluster for a while; sorted
	CSRs      []CSR           // for kubeletd's signers, undecided or approved, without a certificate; sorted by name
	Addons    map[string]string
	// Trouble is why API is false, or what else could not be read; for people.
	Trouble string
}

type trust struct {
	Bootstrapped                 bool
	Kubernetes, Etcd, FrontProxy string // PEM; "" until they exist
	Signer                       string // the one of Kubernetes that signs, PEM
	Moving                       bool   // there are two of Kubernetes: it is being replaced
}

// Unit is a unit as PID 1 sees it.
type Unit struct{ State, LastExit string }

// Node is the node as Kubernetes sees it.
type Node struct {
	PodCIDR   netip.Prefix // zero until allocated
	Ready     bool
	Reason    string // why it is not
	Labelled  bool   // it has the control plane's label
	Tainted   bool   // it has the control plane's taint
	Addresses []netip.Addr
}

// ended is how a unit ends for good: unit.DoNotRestart, as PID 1 tells it.
const ended = "exit 125"

const controlPlaneKey = "node-role.kubernetes.io/control-plane"

// Step is one change, or one thing to wait for.
type Step struct {
	Op  string // "wait for", "write", "remove", "unit start", "unit stop", "unit restart", "addon apply", "csr approve", "csr sign", "node label", "node taint", "node untaint", "node delete", "pods tell", "turn take", "turn keep", "turn give", "extensions tell"
	Arg string
}

func (s Step) String() string { return s.Op + " " + s.Arg }

// rule is one unit and what must be there before it is started.
type rule struct {
	unit   string
	worker bool
	once   bool // it ends by itself, and is done then
	after  []string
}

// rules are in the order of starting. Nothing is started before it can work: under load, a process that fails and is started
// again costs the others more than the wait.
var rules = []rule{
	// Outside a cluster there is nothing to run, and nobody who could ask for it. The volume comes first, for it is shown to the others: what is mounted later is not there.
	{unit: "workload", worker: true, after: []string{"volume VAR", "bootstrap"}},
	{unit: "containerd", worker: true, after: []string{"volume VAR", "workload"}},
	{unit: "image-load", worker: true, once: true, after: []string{"containerd"}},
	{unit: "kube-apiserver", after: []string{"volume VAR", "bootstrap", "address", "hostname", "etcd"}}, // its lease in the cluster is named after the kernel's host name
	{unit: "kube-controller-manager", after: []string{"hostname", "kube-apiserver"}},
	{unit: "kubelet", worker: true, after: []string{"hostname", "containerd", "image-load", "kube-apiserver", "addon rbac"}},
	{unit: "kube-proxy", worker: true, after: []string{"hostname", "kube-apiserver", "node"}}, // of which it needs the address: it would end when that comes
	{unit: "kube-scheduler", after: []string{"hostname", "kube-apiserver"}},
}

// plan returns the steps that lead from have to want. Equal inputs give equal steps. What cannot be done yet is a step "wait for".
func plan(want spec, have State) ([]Step, error) {
	if have.Absent {
		return nil, nil
	}
	files, err := render(want, have)
	if err != nil {
		return nil, err
	}
	wanted, err := addons(want, have)
	if err != nil {
		return nil, err
	}
	p := planner{want: want, have: have, files: files, addons: wanted}
	if pods, known := podNetworkOf(want, have); have.API && known && pods.String() != have.Pods {
		p.do("pods tell", cmp.Or(pods.String(), "nothing")) // before the first pod gets an address
	}
	p.planFiles()
	if want.Role == config.ControlPlane && have.Trust.Bootstrapped && len(have.Members) == 0 {
		p.wait("members") // whether controllers must elect one among them, whose kubelet gets a certificate: all hangs on it
	}
	if have.API && want.Role == config.ControlPlane {
		p.planCluster() // a few calls, before the next processes want the machine for themselves
	}
	p.planUnits()
	p.planNode()
	return append(p.steps, p.waits...), nil
}

type planner struct {
	want   spec
	have   State
	files  []File
	addons []Addon
	steps  []Step
	waits  []Step // each once, in the order met
}

func (p *planner) do(op, arg string) { p.steps = append(p.steps, Step{op, arg}) }

func (p *planner) wait(arg string) {
	if s := (Step{"wait for", arg}); !slices.Contains(p.waits, s) {
		p.waits = append(p.waits, s)
	}
}

func (p *planner) planFiles() {
	for _, f := range p.files {
		want := f.digest(p.have.Pairs)
		if want == "" {
			p.wait("certificate " + f.Profile)
		} else if seal(f, want) != p.have.Files[f.Path] {
			p.do("write", f.Path)
		}
	}
	if _, there := p.have.Files[cniFile]; there && p.want.CNI != "bridge" {
		p.do("remove", cniFile)
	}
}

// inputs is the digest of all that a unit reads once, and whether all its files can be written now.
func (p *planner) inputs(unit string) (string, bool) {
	var b strings.Builder
	complete := true
	need := map[string]bool{}
	for _, e := range entries {
		if slices.Contains(e.units, unit) && (e.worker || p.want.Role != config.Worker) {
			need[e.file] = true
		}
	}
	for _, f := range p.files {
		if !need[f.Path] {
			continue
		}
		delete(need, f.Path)
		if f.Profile == "" {
			b.WriteString(f.Path + "\x00" + f.Text + "\x00")
		} else if f.digest(p.have.Pairs) == "" {
			complete = false
		}
	}
	return digest([]byte(b.String())), complete && len(need) == 0
}

func (p *planner) planUnits() {
	restart := p.mayRestart()
	for _, r := range rules {
		u := p.have.Units[r.unit]
		if p.want.Role == config.Worker && !r.worker {
			if u.State != "" && u.State != "down" {
				p.do("unit stop", r.unit)
			}
			continue
		}
		if r.once && p.have.loaded(r.unit) {
			continue
		}
		inputs, complete := p.inputs(r.unit)
		if u.State != "" && u.State != "down" { // it was started, by whomever: PID 1 keeps it
			if complete && !r.once && p.have.Stamps[r.unit] != inputs {
				if restart {
					p.do("unit restart", r.unit)
				}
			} else if r.once {
				p.wait(r.unit)
			}
			continue
		}
		if u.LastExit == ended && p.have.Stamps[r.unit] == inputs { // its program is missing, or it knows better: again would be the same
			p.wait(r.unit)
			continue
		}
		open := complete
		for _, what := range r.after {
			if !p.reached(what) {
				p.wait(p.named(what))
				open = false
			}
		}
		if open {
			p.do("unit start", r.unit)
		}
	}
	for _, what := range p.behind() {
		p.wait(what)
	}
	for _, r := range rules { // started, but not well
		if u := p.have.Units[r.unit]; u.State == "up" {
			if h, asked := p.have.Health[r.unit]; asked && h != "" {
				p.wait(r.unit)
			}
		}
	}
}

// named is what a node waits for where a rule names something: a worker has no API server of its own.
func (p *planner) named(what string) string {
	if what == "kube-apiserver" && p.want.Role == config.Worker {
		return apiProbe
	}
	return what
}

// reached reports whether something that a rule names is there.
func (p *planner) reached(what string) bool {
	switch what {
	case "volume VAR":
		return p.have.Volume
	case "bootstrap":
		return p.have.Trust.Bootstrapped
	case "address":
		return p.have.Address.IsValid()
	case "hostname":
		return p.want.Node != "" && p.have.Hostname == p.want.Node
	case "etcd":
		return p.have.Etcd
	case "node":
		return p.have.Node != nil
	case "kube-apiserver":
		return p.have.API // on a worker any of the cluster's
	case "workload":
		return p.have.Units[what].State == "up"
	case "containerd":
		h, asked := p.have.Health[what] // it runs for seconds before it listens
		return p.have.Units[what].State == "up" && asked && h == ""
	case "image-load":
		return p.have.loaded("image-load")
	case "addon rbac":
		return p.want.Role == config.Worker || len(p.addons) > 0 && p.applied(p.addons[0])
	}
	return false
}

// loaded reports whether a unit that ends by itself has ended well.
func (s State) loaded(unit string) bool {
	u := s.Units[unit]
	return u.State == "down" && u.LastExit == "exit 0"
}

// applied reports whether an add-on is as it should be, in the eyes of this node.
func (p *planner) applied(a Addon) bool {
	have := p.have.Addons[a.Name]
	return have == digest([]byte(a.Text)) || have != "" && !keeper(p.want.Node, p.have.Members)
}

// clients is whose certificate requests count.
func (s State) clients(want spec) clients { return clients{s.Members, want.Node, s.Address} }

// planCluster is what a control-plane node does inside the cluster. Others do the same, at the same time.
func (p *planner) planCluster() {
	for _, a := range p.addons {
		if !p.applied(a) {
			p.do("addon apply", a.Name)
		}
	}
	if p.have.Leftover && !p.have.Turn && len(p.restarts()) == 0 {
		p.do("extensions tell", extensionsName)
	}
	for _, c := range p.have.CSRs {
		if c.check(p.have.clients(p.want)) != nil {
			continue // nobody's of the cluster: it stays as it is, for a person to decide
		}
		if !c.Approved {
			p.do("csr approve", c.Name)
		}
		p.do("csr sign", c.Name)
	}
	if n := p.have.Node; n != nil {
		if !n.Labelled {
			p.do("node label", controlPlaneKey)
		}
		if p.want.Schedulable && n.Tainted {
			p.do("node untaint", controlPlaneKey)
		} else if !p.want.Schedulable && !n.Tainted {
			p.do("node taint", controlPlaneKey)
		}
	}
	// Only while this node's own API server is well: then etcd is, here, and so the list of members is today's.
	if h, asked := p.have.Health["kube-apiserver"]; asked && h == "" {
		for _, name := range p.have.Strangers {
			p.do("node delete", name)
		}
	}
}

// planNode waits for what the kubelet must bring about.
func (p *planner) planNode() {
	if p.want.Role == config.ControlPlane && !p.have.API && p.have.Units["kube-apiserver"].State == "up" {
		p.wait("kube-apiserver") // the rest is not known as long
	}
	if p.want.Role == config.Worker && !p.have.API && p.have.Units["kubelet"].State == "up" {
		p.wait(apiProbe)
	}
	if !p.have.API || p.have.Units["kubelet"].State != "up" {
		return
	}
	if n := p.have.Node; n == nil || !n.Ready {
		p.wait("node Ready")
	}
}

// unitNames are all units that kubeletd orders, sorted.
func unitNames() []string {
	var out []string
	for _, r := range rules {
		out = append(out, r.unit)
	}
	sort.Strings(out)
	return out
}

// waiting says what is missing and who brings it.
func waiting(what string, want spec, have State) error {
	hint := "not there yet"
	switch name, _ := strings.CutPrefix(what, "certificate "); {
	case name != what:
		hint = "trustd has not signed it yet"
	case what == "bootstrap":
		hint = "the cluster has no authorities yet; run: bhctl bootstrap"
	case what == "volume VAR":
		hint = "storaged has not mounted it yet"
	case what == "address":
		hint = "no interface with a default route, or in the subnet of the cluster's endpoint, has an IPv4 address"
	case what == "members":
		hint = "the cluster's list of nodes is not known yet, and without it nobody's kubelet gets a certificate"
	case what == apiProbe:
		hint = have.Trouble
	case what == "hostname":
		if hint = "the document of kind Machine names none"; want.Node != "" {
			hint = fmt.Sprintf("the kernel's is %q, and the document's %q; PID 1 takes over what networkd writes", have.Hostname, want.Node)
		}
	case what == waitTurn:
		hint = "another control plane starts its part of Kubernetes anew"
	case what == waitRoots:
		hint = "kube-controller-manager has not told all pods the authorities of now"
	case what == waitKubelet:
		hint = "the kubelet has none of the authority that signs now"
	case what == "etcd":
		hint = "nobody listens on " + have.EtcdAddress
	case what == "node" || what == "node Ready" && have.Node == nil:
		hint = fmt.Sprintf("the kubelet has not registered %q yet", want.Node)
	case what == "node Ready":
		hint = have.Node.Reason
	default:
		if u, ok := have.Units[what]; ok {
			hint = "unit is " + u.State
			if u.LastExit != "" {
				hint += " (" + u.LastExit + ")"
			}
			if u.LastExit == ended {
				hint += "; its log says why, and bhctl service restart " + what + " tries again"
			}
			if h := have.Health[what]; h != "" {
				hint += ": " + h
			} else if what == "kube-apiserver" && have.Trouble != "" {
				hint += ": " + have.Trouble
			}
		}
	}
	return errs.New(errs.Unavailable, "%s", hint)
}
