package why

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

var night = time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)

func ago(minutes int) Mark { return Mark{At: night.Add(-time.Duration(minutes) * time.Minute)} }

// explains is a condition that health does not count.
func explains(name, trouble string, minutes int, needs ...string) Condition {
	return Condition{Name: name, Trouble: trouble, Needs: needs, Explains: true, Since: ago(minutes), Help: "bhctl get " + name}
}

// machine is a node that is well, but for what change does to the daemons that it names.
func machine(change map[string]func(*Daemon)) Snapshot {
	var s Snapshot
	for _, name := range []string{"apid", "etcdd", "gateway", "kubeletd", "networkd", "storaged", "trustd", "updated"} {
		d := Daemon{Name: name, Area: map[string]string{"kubeletd": "kubernetes", "etcdd": "etcd"}[name]}
		if d.Area == "" {
			d.Area = name
		}
		if f := change[name]; f != nil {
			f(&d)
		}
		s.Daemons = append(s.Daemons, d)
	}
	return s
}

func behind(text string, minutes int, conditions ...Condition) func(*Daemon) {
	return func(d *Daemon) {
		d.Behind, d.Left, d.Since, d.Conditions = text+"; and more", text, ago(minutes), conditions
	}
}

func has(conditions ...Condition) func(*Daemon) {
	return func(d *Daemon) { d.Conditions = conditions }
}

func silent(text string, minutes int) func(*Daemon) {
	return func(d *Daemon) { d.Silent, d.Silence = text, ago(minutes) }
}

// kubernetes is kubeletd as it reports while nothing of it works.
func kubernetes(minutes int) func(*Daemon) {
	return behind("left to do: wait for etcd and 3 more", minutes,
		explains("containerd", "", 0, "storaged/VAR.mounted", "storaged/VAR.room"),
		explains("kube-apiserver", "kube-apiserver is not started yet: it waits for etcd", minutes, "storaged/VAR.mounted", "trustd/bootstrap", "networkd/address", "etcdd/member"),
		explains("kubelet", "kubelet: connection refused", minutes, "kubeletd/containerd", "kubeletd/kube-apiserver"),
		explains("node", "the node is not Ready", minutes-1, "kubeletd/kubelet", "kubeletd/kube-apiserver"))
}

func etcd(minutes int, more ...Condition) func(*Daemon) {
	return behind("left to do: wait for member", minutes, append(more,
		explains("member", "the etcd member does not run", minutes, "storaged/VAR.mounted", "trustd/bootstrap", "etcdd/certificates", "etcdd/quorum", "networkd/address", "storaged/VAR.room"))...)
}

// TestHistories: how nodes fail, and what a person has to be told first.
func TestHistories(t *testing.T) {
	for _, c := range []struct {
		name string
		s    Snapshot
		want string // of each cause: subjects from the symptom to the first failed step, the command, and what else fails
	}{
		{"all is well", machine(nil), ""},
		{"no address, so no etcd, no API server, no Node", machine(map[string]func(*Daemon){
			"networkd": has(explains("address", "no DHCP server answers on eth0", 15, "networkd/carrier", "networkd/converged"), explains("carrier", "", 0)),
			"etcdd":    etcd(14), "kubeletd": kubernetes(13),
		}), "kubernetes.converged < kubernetes.node < kubernetes.kubelet < kubernetes.kube-apiserver < etcd.member < networkd.address: bhctl get address; etcd.converged"},
		{"the cable is out", machine(map[string]func(*Daemon){
			"networkd": has(explains("address", "no address", 15, "networkd/carrier", "networkd/converged"), explains("carrier", "no network card has a link", 15)),
			"etcdd":    etcd(14),
		}), "etcd.converged < etcd.member < networkd.address < networkd.carrier: bhctl get carrier; "},
		{"an address that the kernel refuses", machine(map[string]func(*Daemon){
			"networkd": behind("left to do: addr add", 15, explains("address", "no address", 15, "networkd/converged")),
			"etcdd":    etcd(14),
		}), "etcd.converged < etcd.member < networkd.address < networkd.converged: bhctl logs networkd; "},
		{"a node that is alone on a cut cable is well", machine(map[string]func(*Daemon){"networkd": has(explains("carrier", "no link", 3))}), ""},
		{"VAR is full, and containerd ends", with(machine(map[string]func(*Daemon){
			"storaged": has(Condition{Name: "VAR.room", Trouble: "VAR is full", Since: ago(30), Help: "bhctl get volumes"}),
			"kubeletd": behind("left to do: wait for containerd", 20, explains("containerd", "containerd: waiting (exit 1)", 20, "storaged/VAR.mounted", "storaged/VAR.room"),
				explains("node", "the node is not Ready", 19, "kubeletd/kubelet", "kubeletd/containerd")),
		}), Unit{Name: "containerd", Trouble: "waiting; ended last with: exit 1", Since: ago(21), Words: []string{"no space left on device"}}),
			"kubernetes.converged < kubernetes.node < containerd.up [no space left on device] < storaged.VAR.room: bhctl get volumes; "},
		{"VAR is full, and etcdd ends: it cannot say so", with(machine(map[string]func(*Daemon){
			"storaged": has(Condition{Name: "VAR.room", Trouble: "VAR is full", Since: ago(30), Help: "bhctl get volumes"}),
			"etcdd":    func(d *Daemon) { d.Silent, d.Behind = "does not answer", "does not answer" },
		}), Unit{Name: "etcdd", Trouble: "waiting", Needs: []string{"storaged/VAR.room"}}), "etcd.converged < etcdd.up < storaged.VAR.room: bhctl get volumes; "},
		{"STATE is locked, so trustd has no keys and the node no document", func() Snapshot {
			s := machine(map[string]func(*Daemon){
				"storaged": has(Condition{Name: "STATE.unlocked", Trouble: "STATE is locked", Since: ago(5), Help: "bhctl unlock"},
					explains("STATE.mounted", "STATE is not mounted", 5, "storaged/STATE.unlocks", "storaged/STATE.unlocked", "storaged/converged")),
				"trustd":  behind("left to do: keys wait for /state/trustd", 5, explains("keys", "keys wait for /state/trustd", 5, "storaged/STATE.mounted")),
				"gateway": behind("waits for a configuration", 5),
			})
			s.Unconfigured = "the node has no configuration yet"
			return s
		}(), "gateway.converged < config.applied < storaged.STATE.mounted < storaged.STATE.unlocked: bhctl unlock; trustd.converged"},
		{"a daemon crashes again and again", with(machine(map[string]func(*Daemon){"trustd": func(d *Daemon) { d.Silent, d.Behind = "does not answer", "does not answer" },
			"etcdd": etcd(9, explains("certificates", "trustd has not signed etcd-peer", 9, "trustd/answers", "trustd/converged", "trustd/bootstrap"))}),
			Unit{Name: "trustd", Trouble: "waiting; ended last with: exit 2", Since: ago(10), Words: []string{"panic: index out of range"}}),
			"etcd.converged < etcd.member < etcd.certificates < trustd.converged < trustd.up [panic: index out of range]: bhctl logs trustd; "},
		{"a unit that asks not to be started again", with(machine(nil), Unit{Name: "kube-proxy", Trouble: "down", Final: true}), "kube-proxy.up: bhctl service restart kube-proxy; "},
		{"the clock is wrong, so certificates are not valid yet", func() Snapshot {
			s := machine(map[string]func(*Daemon){
				"kubeletd": behind("left to do: wait for api", 8, explains("api", "no API server answers: x509: certificate has expired or is not yet valid", 8, "networkd/address")),
				"trustd":   behind("the certificate of the other side seems not to be valid yet: the clock here says 1970", 8),
			})
			s.Clock = "the clock says 1970"
			return s
		}(), "kubernetes.converged < kubernetes.api < clock: bhctl reboot; trustd.converged"},
		{"a certificate has expired while the clock is right", machine(map[string]func(*Daemon){
			"apid":   has(Condition{Name: "certificate", Trouble: "the certificate has expired", Needs: []string{"trustd/answers", "trustd/converged"}, Since: ago(60)}),
			"trustd": behind("this node is no member of its cluster", 90),
		}), "apid.certificate < trustd.converged: bhctl logs trustd; "},
		{"one daemon refuses the document", machine(map[string]func(*Daemon){"networkd": func(d *Daemon) {
			d.Behind, d.Refused, d.Since = "the spec was refused: links.eth9: there is no such link", true, ago(2)
		}}), "networkd.converged: bhctl apply -f FILE; "},
		{"one daemon works, and has not done", machine(map[string]func(*Daemon){"networkd": behind("left to do: dhcp start", 1)}), "networkd.converged: bhctl logs networkd; "},
		{"most members of etcd are away", machine(map[string]func(*Daemon){
			"etcdd":    etcd(40, explains("quorum", "etcd has no quorum: silent: n2, n3", 40, "networkd/address")),
			"kubeletd": kubernetes(39),
		}), "kubernetes.converged < kubernetes.node < kubernetes.kubelet < kubernetes.kube-apiserver < etcd.member < etcd.quorum: bhctl get quorum; etcd.converged"},
		{"a worker's control planes are away", machine(map[string]func(*Daemon){
			"kubeletd": behind("left to do: wait for api", 4, explains("api", "no API server of the cluster answers: connection refused", 4, "networkd/address"),
				explains("kubelet", "kubelet waits", 4, "kubeletd/api"), explains("node", "not known", 4, "kubeletd/kubelet", "kubeletd/api")),
		}), "kubernetes.converged < kubernetes.node < kubernetes.kubelet < kubernetes.api: bhctl get api; "},
		{"nobody has bootstrapped the cluster", machine(map[string]func(*Daemon){
			"trustd": has(explains("bootstrap", "nobody has bootstrapped it", 3)), "etcdd": etcd(3), "kubeletd": kubernetes(3),
		}), "kubernetes.converged < kubernetes.node < kubernetes.kubelet < kubernetes.kube-apiserver < etcd.member < trustd.bootstrap: bhctl get bootstrap; etcd.converged"},
		{"a version was left: the node is well all the same", machine(map[string]func(*Daemon){"updated": has(Condition{Name: "fallback", Trouble: "0.2.0 was left", Remark: true})}), "remark updated.fallback"},
		{"a frozen daemon that others need", machine(map[string]func(*Daemon){
			"trustd": silent("its process runs, but has not answered for 2s: it hangs", 1),
			"etcdd":  etcd(1, explains("certificates", "trustd has not signed etcd-peer", 1, "trustd/answers")),
		}), "etcd.converged < etcd.member < etcd.certificates < trustd.answers: bhctl service restart trustd; "},
		{"a frozen daemon that nobody needs just now", machine(map[string]func(*Daemon){"gateway": silent("it hangs", 1)}), "gateway.answers: bhctl service restart gateway; "},
		{"what a frozen daemon said before does not count", machine(map[string]func(*Daemon){"storaged": func(d *Daemon) {
			d.Silent, d.Conditions = "it hangs", []Condition{{Name: "VAR.room", Trouble: "full"}}
		}}), "storaged.answers: bhctl service restart storaged; "},
		{"two things at once: the one that explains more comes first", with(machine(map[string]func(*Daemon){
			"networkd": has(explains("address", "no address", 15)), "etcdd": etcd(14), "kubeletd": kubernetes(13),
		}), Unit{Name: "gateway", Trouble: "waiting"}),
			"kubernetes.converged < kubernetes.node < kubernetes.kubelet < kubernetes.kube-apiserver < etcd.member < networkd.address: bhctl get address; etcd.converged\ngateway.up: bhctl logs gateway; "},
		{"PID 1 does not answer", Snapshot{Init: "connection refused"}, "init.answers: bhctl reboot; "},
		{"protection is off", Snapshot{Security: "lockdown is none"}, "security: bhctl get security; "},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := Explain(c.s)
			if got := text(a); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
			shuffled := c.s
			shuffled.Daemons, shuffled.Units = slices.Clone(c.s.Daemons), slices.Clone(c.s.Units)
			slices.Reverse(shuffled.Daemons)
			slices.Reverse(shuffled.Units)
			if b := text(Explain(shuffled)); b != text(a) {
				t.Errorf("in another order:\n%s\nbefore\n%s", b, text(a))
			}
		})
	}
}

func with(s Snapshot, u ...Unit) Snapshot {
	s.Units = append(s.Units, u...)
	return s
}

func text(a Answer) string {
	var lines []string
	for _, c := range a.Causes {
		var steps []string
		for _, s := range c.Steps {
			step := s.Subject
			if len(s.Words) > 0 {
				step += fmt.Sprint(" ", s.Words)
			}
			if s.Text == "" || s.Command == "" {
				step += " (says nothing)"
			}
			steps = append(steps, step)
		}
		lines = append(lines, strings.Join(steps, " < ")+": "+c.Steps[len(c.Steps)-1].Command+"; "+strings.Join(c.Also, ", "))
	}
	for _, r := range a.Remarks {
		lines = append(lines, "remark "+r.Subject)
	}
	return strings.Join(lines, "\n")
}

// Whatever needs whatever: every check that fails is explained, each cause ends in something that needs nothing else that fails, and nothing goes round for ever.
func FuzzExplain(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4})
	f.Add([]byte{0x10, 0x21, 0x32, 0x02, 0x20}) // a circle with a way out
	testfuzz.Run(f, func(t *testing.T, edges []byte) {
		d := Daemon{Name: "d", Area: "d", Behind: "x"}
		for i := range 16 {
			d.Conditions = append(d.Conditions, Condition{Name: fmt.Sprintf("c%x", i), Trouble: "x", Explains: i%3 > 0})
		}
		for _, e := range edges[:min(len(edges), 64)] {
			c := &d.Conditions[e>>4]
			c.Needs = append(c.Needs, fmt.Sprintf("d/c%x", e&15))
		}
		told := map[string]bool{}
		for _, c := range Explain(Snapshot{Daemons: []Daemon{d}}).Causes {
			seen := map[string]bool{}
			for _, s := range c.Steps {
				if seen[s.Subject] {
					t.Errorf("%s is twice in %v", s.Subject, c.Steps)
				}
				seen[s.Subject], told[s.Subject] = true, true
			}
			for _, also := range c.Also {
				told[also] = true
			}
		}
		for i, c := range d.Conditions {
			if name := fmt.Sprintf("d.c%x", i); !c.Explains && !told[name] {
				t.Errorf("nobody says why %s fails", name)
			}
		}
		if !told["d.converged"] {
			t.Error("nobody says why d has not converged")
		}
	})
}
