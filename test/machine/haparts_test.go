package machine

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// rolls restarts all nodes in turn while clients ask the Service: none may be told more than its policy bears.
func (h *ha) rolls(t *testing.T) {
	before := h.c.mustBoots(t)
	start := time.Now()
	missed := h.visited(t, func() {
		if out, err := h.n.try(t.Context(), slowly(40*time.Second), "bhctl", "reboot", "--cluster", "--detach", "--drain-timeout", "5m", "--node-timeout", "15m"); err != nil {
			t.Fatalf("bhctl reboot --cluster: %v\n%s", err, out)
		}
		last := ""
		eventually(t, slowly(haRoll), "all have restarted", func() error {
			var st rollingStatus
			if err := h.c.ask(t, &st, "rolling", "status"); err != nil {
				return err
			}
			if away := st.away(); strings.Contains(away, " ") {
				t.Errorf("two nodes at once: %s", away)
			}
			for _, n := range st.Nodes {
				if n.State == "draining" || n.State == "restarting" || n.State == "settling" {
					if now := n.Name + " " + n.State; now != last {
						last = now
						t.Logf("» %s: %s", time.Since(start).Round(time.Second), now)
					}
				}
			}
			switch st.State {
			case "done":
				return nil
			case "halted", "aborted":
				t.Fatalf("it %s: %s", st.State, st.Detail)
			}
			return fmt.Errorf("it is %s: %+v", st.State, st.Nodes)
		})
	})
	t.Logf("» rolling restart of four nodes: %s", time.Since(start).Round(time.Second))
	if len(missed) > 0 {
		t.Errorf("requests failed at every node that they tried: %q", missed)
	}
	h.c.states(t, slowly(100*time.Second), h.c.ready())
	after := h.c.mustBoots(t)
	for _, name := range h.c.nodes {
		if after[name] == before[name] || after[name] == "" {
			t.Errorf("%s: boot %q before, %q after", name, before[name], after[name])
		}
	}
	h.shopReady(t)
}

// leaderDies cuts the power of the machine whose member of etcd leads.
func (h *ha) leaderDies(t *testing.T) {
	h.dies(t, func(leader, _ string) string { return leader })
}

// holderDies cuts the power of the machine that has the virtual address.
func (h *ha) holderDies(t *testing.T) {
	h.dies(t, func(_, holder string) string { return holder })
}

// dies cuts a control plane's power, of the one that pick names. The others take writes, by both APIs; the virtual address is at another one if it was there; kubectl works through each and
// through the address. Then it is powered on again, and all is as before.
func (h *ha) dies(t *testing.T, pick func(leader, holder string) string) {
	tokens, kube := h.c.tokenWrites(t, haSlow), h.kubeWrites(t)
	address := &pulse{Every: slowly(500 * time.Millisecond), Limit: slowly(5 * time.Second), Slow: haSlow, Try: h.atVirtual(t)}
	const door = "the virtual address"
	address.start(t.Context(), door)
	var name string
	missed := h.visited(t, func() {
		for _, p := range []*pulse{kube, tokens} { // tokens last, and not for long: a cluster keeps a thousand
			p.start(t.Context(), h.c.nodes[:3]...)
			p.beatsAt(t, slowly(20*time.Second), "each takes writes", time.Now(), h.c.nodes[:3]...)
		}
		leader, asked := h.c.leader(t), time.Now()
		address.beatsAt(t, slowly(100*time.Second), door+" answers", asked, door)
		at, err := address.after(asked, anyBeat)
		if err != nil {
			t.Fatal(err)
		}
		name = pick(leader, at.who)
		d := h.c.dies(t, name)
		t.Logf("» the power of %s is cut; etcd's leader was %s, the virtual address was at %s", name, leader, at.who)
		detected := tokens.takesOver(t, "writes by Bulkhead's API", d)
		tokens.end()
		kube.takesOver(t, "writes by Kubernetes' API", d)
		h.moves(t, address, d, detected)
		kube.end()
		address.end()
		h.kubectlWorks(t, name)
	})
	t.Logf("» while %s was away %d requests failed at every node that they tried, which is no promise: a Service keeps a dead node's pods until Kubernetes takes the node for dead", name, len(missed))

	lost := h.c.ready()
	lost[name] = "lost"
	h.c.states(t, slowly(100*time.Second), lost)
	m := h.c.machine(t, name)
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	h.c.states(t, slowly(haSettle), h.c.ready())
	h.shopReady(t)
}

// moves waits until another than the dead machine answers at the virtual address. detected is how long etcd needed to take writes again: until then nobody can take the address.
func (h *ha) moves(t *testing.T, address *pulse, d death, detected time.Duration) {
	var b beat
	eventually(t, slowly(2*time.Minute), "the virtual address is at another node", func() (err error) {
		b, err = address.after(d.proved, func(b beat) bool { return b.who != d.machine })
		return err
	})
	took := address.since(d, b)
	t.Logf("» virtual address: an API server answers at %s %s after %s died (budget %s on real machines)", b.who, took.Round(10*time.Millisecond), d.machine, movedBudget)
	if limit := movedBudget + movedSlack + detected; took > limit {
		t.Errorf("the virtual address was away for %s, want at most %s: %s, %s until etcd took writes, and %s for emulated machines", took, limit, movedBudget, detected, movedSlack)
	}
}

// kubectlWorks: through each that is left, and through the virtual address.
func (h *ha) kubectlWorks(t *testing.T, away string) {
	try := func(what string, args ...string) {
		t.Helper()
		eventually(t, slowly(time.Minute), "kubectl works through "+what, func() error {
			_, err := h.n.try(t.Context(), slowly(20*time.Second), "kubectl", append(args, "get", "nodes")...)
			return err
		})
	}
	for _, name := range h.c.nodes[:3] {
		if name != away {
			try(name, fmt.Sprintf("--server=https://127.0.0.1:%d", h.c.machine(t, name).Port(6443)))
		}
	}
	try("the virtual address", fmt.Sprintf("--server=https://127.0.0.1:%d", h.c.machine(t, "test-w1").Port(virtualPort)), "--tls-server-name="+virtualIP)
	// The worker's kubelet calls by its own node's balancer: it reports all the same.
	eventually(t, slowly(100*time.Second), "the worker is Ready", func() error {
		out, err := h.n.try(t.Context(), slowly(20*time.Second), "kubectl", fmt.Sprintf("--server=https://127.0.0.1:%d", h.c.machine(t, "test-w1").Port(virtualPort)), "--tls-server-name="+virtualIP,
			"get", "node", "test-w1", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("Ready is %q", out)
		}
		return err
	})
}
