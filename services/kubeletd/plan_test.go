package kubeletd

import (
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

var update = flag.Bool("update", false, "write the goldens anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

var addr = netip.MustParseAddr

// cp is what an empty document with a host name gives.
func cp(t *testing.T) spec {
	t.Helper()
	s, err := parse([]byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// blank is a node on which nothing has happened.
func blank() State {
	s := State{Dir: "/run/bulkhead/kubeletd", EtcdAddress: "127.0.0.1:2379", Audit: "/var/log/kubernetes/audit",
		Pairs: map[string]string{}, Files: map[string]string{}, Stamps: map[string]string{}, Units: map[string]Unit{}, Health: map[string]string{}, Addons: map[string]string{}}
	for _, u := range unitNames() {
		s.Units[u] = Unit{State: "down"}
	}
	return s
}

// model applies steps to a state, and does what PID 1 and Kubernetes would.
func model(s State, want spec, steps []Step) State {
	s.Files, s.Stamps, s.Units, s.Addons = maps.Clone(s.Files), maps.Clone(s.Stamps), maps.Clone(s.Units), maps.Clone(s.Addons)
	files, _ := render(want, s)
	all, _ := addons(want, s)
	p := planner{want: want, have: s, files: files, addons: all}
	for _, step := range steps {
		switch step.Op {
		case "write":
			for _, f := range files {
				if f.Path == step.Arg {
					s.Files[f.Path] = seal(f, f.digest(s.Pairs))
				}
			}
		case "remove":
			delete(s.Files, step.Arg)
		case "unit start", "unit restart":
			s.Units[step.Arg] = Unit{State: "up"}
			if step.Arg == "image-load" {
				s.Units[step.Arg] = Unit{State: "down", LastExit: "exit 0"}
			}
			s.Stamps[step.Arg], _ = p.inputs(step.Arg)
			if step.Arg == "kube-apiserver" {
				s.API = true
			}
			if step.Arg == "kubelet" {
				s.Node = &Node{PodCIDR: netip.MustParsePrefix("10.244.0.0/24"), Ready: true}
				s.Peers = map[string]Peer{want.Node: {PodCIDR: s.Node.PodCIDR, Ours: true}}
			}
		case "pods tell":
			pods, _ := podNetworkOf(want, s)
			s.Pods = pods.String()
		case "unit stop":
			s.Units[step.Arg] = Unit{State: "down"}
		case "addon apply":
			for _, a := range all {
				if a.Name == step.Arg {
					s.Addons[a.Name] = digest([]byte(a.Text))
				}
			}
		case "node delete":
			s.Strangers = slices.DeleteFunc(slices.Clone(s.Strangers), func(n string) bool { return n == step.Arg })
		case "csr sign":
			s.CSRs = slices.DeleteFunc(slices.Clone(s.CSRs), func(c CSR) bool { return c.Name == step.Arg })
		case "node label", "node taint", "node untaint":
			n := *s.Node
			n.Labelled = n.Labelled || step.Op == "node label"
			n.Tainted = step.Op == "node taint" || n.Tainted && step.Op != "node untaint"
			s.Node = &n
		}
	}
	return s
}

var (
	n1n2 = map[string]Member{"n1": {config.ControlPlane, []netip.Addr{addr("10.5.0.11")}}, "n2": {config.ControlPlane, []netip.Addr{addr("10.5.0.12")}}}
	n1w1 = map[string]Member{"n1": {config.ControlPlane, []netip.Addr{addr("10.5.0.11")}}, "w1": {config.Worker, []netip.Addr{addr("10.5.0.101")}}}
)

// boot is the story of a first boot: what happens from outside, one event after the other.
var boot = []struct {
	name  string
	event func(*State)
}{
	{"nothing", func(*State) {}},
	{"volume", func(s *State) { s.Volume = true }},
	{"host name", func(s *State) { s.Hostname = "n1" }},
	{"address", func(s *State) {
		s.Address, s.Nameservers = addr("10.0.2.15"), []netip.Addr{addr("10.0.2.3")}
	}},
	{"bootstrap", func(s *State) {
		s.Trust = trust{Bootstrapped: true, Kubernetes: "KUBERNETES\n", Etcd: "ETCD\n", FrontProxy: "FRONT\n"}
	}},
	{"containerd listens", func(s *State) { s.Health["containerd"] = "" }},
	{"certificates", func(s *State) {
		for _, p := range append(profiles(), keeperProfile) {
			s.Pairs[p] = digest([]byte(p))
		}
	}},
	{"etcd", func(s *State) { s.Etcd = true }},
	{"members", func(s *State) {
		s.Members = map[string]Member{"n1": {config.ControlPlane, []netip.Addr{addr("10.0.2.15")}}}
	}},
}

// grow runs the story, and plans and applies after each event until nothing changes.
func grow(t *testing.T, want spec, report func(string)) State {
	t.Helper()
	s := blank()
	for _, b := range boot {
		b.event(&s)
		report("# " + b.name)
		for range 10 {
			steps, err := plan(want, s)
			if err != nil {
				t.Fatal(err)
			}
			work := slices.DeleteFunc(slices.Clone(steps), func(s Step) bool { return s.Op == "wait for" })
			if len(work) == 0 {
				for _, w := range steps {
					report(w.String())
				}
				break
			}
			for _, w := range work {
				report(w.String())
			}
			report("--")
			s = model(s, want, steps)
		}
	}
	if rest, err := plan(want, s); err != nil || len(rest) > 0 {
		t.Errorf("after a whole boot: %v left, %v", rest, err)
	}
	return s
}

func TestPlanBoot(t *testing.T) {
	var b strings.Builder
	want := cp(t)
	s := grow(t, want, func(line string) { b.WriteString(line + "\n") })
	golden(t, "boot.plan", b.String())

	// What may change afterwards, and what comes of it.
	for _, c := range []struct {
		name   string
		change func(*spec, *State)
		steps  string
	}{
		{"a renewed certificate restarts nothing", func(_ *spec, s *State) { s.Pairs["kube-apiserver-server"] = "new" },
			"write kubernetes/kube-apiserver/server.pem"},
		{"another address", func(_ *spec, s *State) { s.Address = addr("10.0.2.16") },
			"write kubernetes/kube-apiserver/args; write kubernetes/kubelet/args; unit restart kube-apiserver; unit restart kubelet"},
		{"another name server", func(_ *spec, s *State) { s.Nameservers = nil }, "addon apply coredns"},
		{"no pod network of ours", func(w *spec, _ *State) { w.CNI = "none" }, "pods tell nothing; remove cni/10-bulkhead.conflist"},
		{"a pod security level", func(w *spec, _ *State) { w.PodSecurity = "restricted" },
			"write kubernetes/kube-apiserver/admission.yaml; unit restart kube-apiserver"},
		{"not schedulable", func(w *spec, _ *State) { w.Schedulable = false },
			"write kubernetes/kubelet/config.yaml; node taint node-role.kubernetes.io/control-plane; unit restart kubelet"},
		{"schedulable again", func(_ *spec, s *State) { n := *s.Node; n.Tainted = true; s.Node = &n }, "node untaint node-role.kubernetes.io/control-plane"},
		{"a file was touched", func(_ *spec, s *State) { s.Files[folder+"/kube-apiserver/audit.yaml"] = "x" }, "write kubernetes/kube-apiserver/audit.yaml"},
		{"kubeletd died before its stamp", func(_ *spec, s *State) { s.Stamps["kube-scheduler"] = "" }, "unit restart kube-scheduler"},
		{"containerd was started again, and does not listen yet", func(_ *spec, s *State) {
			s.Health["containerd"], s.Units["image-load"] = "nobody listens", Unit{State: "down"}
		}, "wait for containerd"},
		{"a unit is down", func(_ *spec, s *State) { s.Units["kube-scheduler"] = Unit{State: "down", LastExit: "exit 0"} }, "unit start kube-scheduler"},
		{"a unit has ended for good", func(_ *spec, s *State) { s.Units["kube-scheduler"] = Unit{State: "down", LastExit: "exit 125"} }, "wait for kube-scheduler"},
		{"a unit has ended for good, with other inputs", func(_ *spec, s *State) {
			s.Units["kube-scheduler"], s.Stamps["kube-scheduler"] = Unit{State: "down", LastExit: "exit 125"}, "other"
		}, "unit start kube-scheduler"},
		{"a unit is restarted by PID 1", func(_ *spec, s *State) { s.Units["kubelet"] = Unit{State: "waiting"} }, ""},
		{"the API server does not answer", func(_ *spec, s *State) {
			s.API, s.Node, s.Addons = false, nil, nil
			s.Health["kube-apiserver"] = "connection refused"
		}, "wait for kube-apiserver"},
		{"the API server is well but lets nothing be read", func(_ *spec, s *State) { s.API, s.Node, s.Addons = false, nil, nil }, "wait for kube-apiserver"},
		{"trustd is away and nothing is known of authorities", func(_ *spec, s *State) { s.Trust, s.Pairs = trust{}, map[string]string{} }, ""},
		{"the node is not ready", func(_ *spec, s *State) { n := *s.Node; n.Ready = false; s.Node = &n }, "wait for node Ready"},
		{"an add-on was deleted", func(_ *spec, s *State) { s.Addons["coredns"] = "" }, "addon apply coredns"},
		{"etcd is away", func(_ *spec, s *State) { s.Etcd = false }, ""},
		{"its own API server is away and another answers", func(_ *spec, s *State) {
			s.Units["kube-apiserver"] = Unit{State: "waiting"}
			s.Health["kube-apiserver"] = "connection refused"
		}, ""},
		{"a second control plane: one of each controller leads", func(_ *spec, s *State) { s.Members = n1n2 },
			"write kubernetes/kube-controller-manager/args; write kubernetes/kube-scheduler/config.yaml; unit restart kube-controller-manager; unit restart kube-scheduler"},
		{"another authority of etcd, with other control planes", func(_ *spec, s *State) {
			s.Trust.Etcd, s.Health["kube-apiserver"] = "TWO\n", ""
			s.Members, s.Stamps = n1n2, maps.Clone(s.Stamps)
		}, "write kubernetes/pki/etcd-ca.pem; write kubernetes/kube-controller-manager/args; write kubernetes/kube-scheduler/config.yaml; turn take kube-apiserver; wait for turn"},
		{"another authority of etcd, when it is this node's turn", func(_ *spec, s *State) { s.Trust.Etcd, s.Turn = "TWO\n", true },
			"write kubernetes/pki/etcd-ca.pem; unit restart kube-apiserver"},
		{"the turn is given when the API server is well again", func(_ *spec, s *State) { s.Turn, s.Health["kube-apiserver"] = true, "" }, "turn give kube-apiserver"},
		{"and not before it was asked", func(_ *spec, s *State) { s.Turn = true }, "turn keep kube-apiserver"},
		{"two authorities of Kubernetes: pods must know both", func(_ *spec, s *State) { s.Trust.Moving, s.KubeletSigned = true, true }, "wait for ConfigMaps kube-root-ca.crt"},
		{"two authorities of Kubernetes: the kubelet must have a certificate of the one that signs", func(_ *spec, s *State) { s.Trust.Moving, s.Published = true, true }, "wait for kubelet's certificates"},
		{"extensions are told an authority that is gone", func(_ *spec, s *State) { s.Leftover = true }, "extensions tell extension-apiserver-authentication"},
		{"and this node's API server tells it, too", func(_ *spec, s *State) {
			s.Leftover, s.Trust.FrontProxy = true, "TWO\n"
		}, "write kubernetes/pki/front-proxy-ca.pem; unit restart kube-apiserver"},
		{"a worker: nothing", func(_ *spec, s *State) { s.Members = n1w1 }, ""},
		{"members are not known", func(_ *spec, s *State) {
			s.Members, s.CSRs, s.Strangers = nil, []CSR{{Name: "x", User: "system:node:n1"}}, nil
		}, "wait for members"},
		{"another node's pods", func(_ *spec, s *State) {
			s.Members = n1w1
			s.Peers = map[string]Peer{"w1": {PodCIDR: netip.MustParsePrefix("10.244.1.0/24"), Address: addr("10.5.0.101")}}
		}, "pods tell 10.244.0.0/24 of 10.244.0.0/16, 10.244.1.0/24 via 10.5.0.101"},
		{"kubeletd was started anew: what networkd has stays until all is known", func(_ *spec, s *State) { s.Pods, s.Peers = "", nil }, ""},
		{"kubeletd was started anew before trustd", func(_ *spec, s *State) { s.Pods, s.Members = "", nil }, "wait for members"},
		{"Kubernetes lets the Node not be read", func(_ *spec, s *State) { s.Node = nil }, "wait for node Ready"},
		{"networkd was started anew", func(_ *spec, s *State) { s.Pods = "" }, "pods tell 10.244.0.0/24 of 10.244.0.0/16"},
		{"a node was removed from the cluster", func(_ *spec, s *State) { s.Strangers, s.Health["kube-apiserver"] = []string{"w1"}, "" }, "node delete w1"},
		{"a node was removed, says a list that may be old", func(_ *spec, s *State) {
			s.Strangers, s.Health["kube-apiserver"] = []string{"w1"}, "etcd failed"
		}, "wait for kube-apiserver"},
	} {
		w, have := want, model(s, want, nil)
		have.Pairs, have.Health = maps.Clone(s.Pairs), maps.Clone(s.Health)
		c.change(&w, &have)
		steps, err := plan(w, have)
		var got []string
		for _, s := range steps {
			got = append(got, s.String())
		}
		if err != nil || strings.Join(got, "; ") != c.steps {
			t.Errorf("%s: got %s, %v, want %s", c.name, strings.Join(got, "; "), err, c.steps)
		}
	}
}

func TestPlanWorker(t *testing.T) {
	want := cp(t)
	want.Role, want.Endpoint = config.Worker, "https://10.0.0.5:6443"
	s := blank()
	for _, b := range boot {
		b.event(&s)
	}
	s.Units["kube-scheduler"] = Unit{State: "up"}
	s.Units["workload"], s.Units["containerd"], s.Units["image-load"] = Unit{State: "up"}, Unit{State: "up"}, Unit{State: "down", LastExit: "exit 0"}
	var b strings.Builder
	next := func() {
		t.Helper()
		steps, err := plan(want, s)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps {
			fmt.Fprintln(&b, s)
		}
		s = model(s, want, steps)
	}
	next()
	b.WriteString("-- with an API server of the cluster\n")
	s.API = true
	next()
	// Once it has a Node, the API says what it needs to know; what a control plane does there is none of its business.
	b.WriteString("-- with its Node\n")
	s.Node = &Node{Ready: true, PodCIDR: netip.MustParsePrefix("10.244.1.0/24")}
	s.Members, s.Strangers = map[string]Member{"n1": {Role: config.Worker}, "cp": {config.ControlPlane, []netip.Addr{addr("10.5.0.11")}}}, []string{"gone"}
	s.Peers = map[string]Peer{"cp": {PodCIDR: netip.MustParsePrefix("10.244.0.0/24"), Address: addr("10.5.0.11")}}
	s.CSRs = []CSR{{Name: "x", User: "system:node:n1", Approved: true}}
	next()
	if rest, err := plan(want, s); err != nil || len(rest) > 0 {
		t.Errorf("after all: %v left, %v", rest, err)
	}
	golden(t, "worker.plan", b.String())
}

func TestRender(t *testing.T) {
	s := grow(t, cp(t), func(string) {})
	files, err := render(cp(t), s)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(entries) {
		t.Errorf("%d files of %d rendered", len(files), len(entries))
	}
	for _, f := range files {
		if f.Profile == "" && !strings.HasSuffix(f.Path, ".pem") {
			golden(t, filepath.Join("files", strings.ReplaceAll(f.Path, "/", "_")), f.Text)
		}
	}
	all, err := addons(cp(t), s)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		paths, bodies, err := a.objects()
		if err != nil || len(paths) != len(bodies) || len(paths) == 0 {
			t.Errorf("%s: %v, %v", a.Name, paths, err)
		}
		golden(t, "files/addon_"+a.Name+".yaml", a.Text+"# "+strings.Join(paths, "\n# ")+"\n")
	}
	w := cp(t)
	w.Schedulable = false
	s.Nameservers = nil
	f := gather(w, s)
	for name, want := range map[string]string{"kubelet.yaml": "registerWithTaints", "coredns.yaml": "cache 30"} {
		if text, err := execute(name, f); err != nil || !strings.Contains(text, want) || strings.Contains(text, "forward") {
			t.Errorf("%s: %v, want %q and no forward in\n%s", name, err, want, text)
		}
	}
}

func TestNth(t *testing.T) {
	for _, c := range []struct {
		subnet string
		n      uint32
		want   string
	}{{"10.96.0.0/16", 10, "10.96.0.10"}, {"10.96.5.7/16", 1, "10.96.0.1"}, {"fd00::/108", 10, "fd00::a"}} {
		if got := nth(netip.MustParsePrefix(c.subnet), c.n); got.String() != c.want {
			t.Errorf("nth(%s, %d) = %s, want %s", c.subnet, c.n, got, c.want)
		}
	}
}

// TestUnits: every unit that is ordered has a file, and reads what is rendered for it.
func TestUnits(t *testing.T) {
	units, err := unitfile.Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	var names, shown []string
	for _, u := range units {
		if u.Name != "kubeletd" && !slices.Contains(u.Owners, 110) {
			continue
		}
		shown = append(shown, u.Show...)
		if u.Name == "kubeletd" {
			if port := fmt.Sprintf("loopback:%d", balance.Port); !slices.Contains(u.Listen, port) {
				t.Errorf("kubeletd listens at %q; Kubernetes' files name %s", u.Listen, port)
			}
			continue
		}
		names = append(names, u.Name)
		if u.Autostart || len(u.Owners) != 1 || u.Owners[0] != 110 {
			t.Errorf("%s: autostart %v, owners %v, want false and kubeletd", u.Name, u.Autostart, u.Owners)
		}
		for _, e := range u.Env {
			path, ok := strings.CutPrefix(e, "KUBE_ARGS_FILE=/run/bulkhead/kubeletd/")
			if ok && !slices.ContainsFunc(entries, func(e entry) bool { return e.file == path && slices.Contains(e.units, u.Name) }) {
				t.Errorf("%s: nobody writes %s", u.Name, path)
			}
		}
	}
	slices.Sort(names)
	if want := unitNames(); !slices.Equal(names, want) {
		t.Errorf("units %q, want %q", names, want)
	}
	// The workload side is shown the folders of what its units read, and no folder with a key of the control plane.
	for _, e := range entries {
		folder := "/run/bulkhead/kubeletd/" + path.Dir(e.file)
		if slices.Contains(shown, folder) != e.worker && folder != "/run/bulkhead/kubeletd/kubernetes/pki" {
			t.Errorf("%s is in a folder that the workload side is shown: %v, a worker has it: %v", e.file, !e.worker, e.worker)
		}
		if e.profile != "" && strings.HasSuffix(folder, "/pki") {
			t.Errorf("%s: a key beside what everybody reads", e.file)
		}
	}
}

// FuzzPlanConverges: from any state with everything given, applying plans leads to where nothing is left.
func FuzzPlanConverges(f *testing.F) {
	f.Add(uint64(0), uint8(0))
	f.Add(^uint64(0), uint8(7))
	f.Add(uint64(0x5555), uint8(3))
	testfuzz.Run(f, func(t *testing.T, bits uint64, kind uint8) {
		next := func() bool { b := bits&1 == 1; bits = bits>>1 | bits<<63; return b }
		want := cp(t)
		want.Schedulable = next()
		if next() {
			want.CNI = "none"
		}
		s := blank()
		for _, b := range boot {
			b.event(&s)
		}
		for i, u := range unitNames() {
			s.Units[u] = Unit{State: []string{"down", "up", "waiting", "starting"}[(int(kind)+i)%4]}
			if next() {
				s.Stamps[u] = "old"
			}
		}
		s.Units["image-load"] = Unit{State: "down", LastExit: map[bool]string{true: "exit 0", false: "exit 1"}[next()]}
		if s.Units["kubelet"].State == "up" {
			s.Node = &Node{Ready: true, Tainted: next(), Labelled: next()}
		}
		s.API = s.Units["kube-apiserver"].State == "up"
		if next() {
			s.Files[cniFile] = "x"
		}
		var steps []Step
		for range 12 {
			var err error
			if steps, err = plan(want, s); err != nil {
				t.Fatal(err)
			}
			s = model(s, want, steps)
			for u, v := range s.Units { // PID 1 goes on
				if v.State == "waiting" || v.State == "starting" {
					s.Units[u] = Unit{State: "up"}
					if u == "kube-apiserver" {
						s.API = true
					} else if u == "kubelet" && s.Node == nil {
						s.Node = &Node{Ready: true}
					}
				}
			}
		}
		if len(steps) > 0 {
			t.Errorf("bits %x, kind %d: left %v", bits, kind, steps)
		}
	})
}

// The first rule that fits decides: no rule that leaves the cluster's own parts out may come before the one about secrets.
func TestAuditSeesSecretsReadByKubeSystem(t *testing.T) {
	var policy struct {
		Rules []struct {
			Level      string
			Users      []string
			UserGroups []string `yaml:"userGroups"`
			Resources  []struct{ Resources []string }
		}
	}
	text, err := execute("audit.yaml", &facts{})
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(text), &policy); err != nil {
		t.Fatal(err)
	}
	for _, r := range policy.Rules {
		if len(r.Resources) > 0 && slices.Contains(r.Resources[0].Resources, "secrets") {
			return
		}
		if r.Level == "None" && (len(r.UserGroups) > 0 || len(r.Users) > 1) {
			t.Errorf("%v %v may read secrets unseen", r.Users, r.UserGroups)
		}
	}
	t.Error("no rule about secrets")
}

// TestAbsent: in an image without Kubernetes there is nothing to wait for, so that its node can be healthy, in a cluster too.
func TestAbsent(t *testing.T) {
	s := blank()
	s.Absent, s.Trust.Bootstrapped, s.Volume = true, true, true
	steps, err := plan(cp(t), s)
	if err != nil || len(steps) != 0 {
		t.Errorf("plan = %v, %v; want nothing to do", steps, err)
	}
	if st := statusOf(cp(t), s); len(st.GetComponents()) != 0 || st.GetNodeReason() != "this image has no Kubernetes" {
		t.Errorf("status = %v", st)
	}
}
