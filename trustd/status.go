package trustd

import (
	"context"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/clock"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// figures are trustd's metrics.
type figures struct {
	desired, observed, converged  *metrics.Vec
	claimed, bootstrapped         *metrics.Vec
	signed                        *metrics.Vec
	refused, wrongClaims, tokens  *metrics.Vec
	accountTokens, seals, unseals *metrics.Vec
	expires                       *metrics.Vec
	refusedJoins, refusedNodes    *metrics.Vec
}

func newFigures(s *metrics.Set) figures {
	f := figures{
		desired:       s.Gauge("bulkhead_trustd_generation_desired", "Generation of the newest specification."),
		observed:      s.Gauge("bulkhead_trustd_generation_observed", "Generation that names in certificates come from."),
		converged:     s.Gauge("bulkhead_trustd_converged", "Whether keys lie where they belong (1) or not yet (0)."),
		claimed:       s.Gauge("bulkhead_trustd_claimed", "Whether somebody owns the node."),
		bootstrapped:  s.Gauge("bulkhead_trustd_bootstrapped", "Whether the cluster's authorities exist."),
		signed:        s.Counter("bulkhead_trustd_certificates_signed_total", "Certificates signed since the start.", "profile"),
		refused:       s.Counter("bulkhead_trustd_certificates_refused_total", "Requests for certificates refused since the start."),
		wrongClaims:   s.Counter("bulkhead_trustd_claims_refused_total", "Claims with a wrong proof since the start."),
		tokens:        s.Counter("bulkhead_trustd_tokens_minted_total", "Bearer tokens minted since the start."),
		accountTokens: s.Counter("bulkhead_trustd_service_account_tokens_signed_total", "Service-account tokens signed since the start."),
		seals:         s.Counter("bulkhead_trustd_secrets_encrypted_total", "Encryptions for Kubernetes since the start."),
		unseals:       s.Counter("bulkhead_trustd_secrets_decrypted_total", "Decryptions for Kubernetes since the start."),
		refusedJoins:  s.Counter("bulkhead_trustd_joins_refused_total", "Nodes that were not let into the cluster since the start."),
		refusedNodes:  s.Counter("bulkhead_trustd_node_calls_refused_total", "Calls of nodes that showed no member's key since the start."),
		expires:       s.Gauge("bulkhead_trustd_authority_expiry_timestamp_seconds", "When an authority's certificate expires, Unix time.", "authority"),
	}
	for _, c := range []*metrics.Vec{f.refused, f.wrongClaims, f.tokens, f.accountTokens, f.seals, f.unseals, f.refusedJoins, f.refusedNodes} {
		c.Add(0) // a counter that has not counted yet is 0, not absent
	}
	return f
}

// publish makes what others can trust from keys and spec. The caller holds d.mu.
func (d *Daemon) publish() {
	if d.where == unknown {
		return // "not claimed" would be a guess
	}
	k, _ := d.keys.Get()
	sp, _ := d.spec.Get()
	t := k.trust()
	t.Names = k.spec(sp).allNames()
	if k.worker() { // it trusts what it heard last
		t = proto.CloneOf(d.known)
		t.Claimed, t.Names = true, k.spec(sp).allNames()
	} else if d.known != nil {
		t.Nodes, t.Revoked = d.known.GetNodes(), d.known.GetRevoked()
	}
	if k.node != nil {
		t.NodeName, t.NodeRole = k.node.name, k.node.role
	}
	t.Authorities = authoritiesID(t)
	if old, _ := d.trust.Get(); proto.Equal(old, t) && old != nil {
		return
	}
	d.trust.Set(t)
	for _, a := range k.authorities() {
		d.count.expires.Set(float64(a.cert.NotAfter.Unix()), a.name)
	}
	if k.worker() {
		for _, c := range trusted(t) {
			d.count.expires.Set(float64(c.GetNotAfter().GetSeconds()), c.GetProfile())
		}
	}
	d.count.claimed.Set(number(t.Claimed))
	d.count.bootstrapped.Set(number(t.Bootstrapped))
}

// trust is what the keys say by themselves.
func (k *keyring) trust() *trustv1.TrustState {
	t := &trustv1.TrustState{Claimed: k.owned(), Bootstrapped: k.cluster != nil, OsCa: k.osPEM(), Rotation: k.stageOf()}
	if k.os != nil {
		t.OsCa = k.bundle(k.os)
	}
	for _, key := range k.tokens {
		t.TokenKeys = append(t.TokenKeys, &trustv1.TokenKey{Id: key.id, PublicKey: key.public})
	}
	if c := k.cluster; c != nil {
		t.EtcdCa, t.KubernetesCa, t.FrontProxyCa = k.bundle(c.etcd), k.bundle(c.kubernetes), k.bundle(c.frontProxy)
	}
	return t
}

// report makes the state that machined sees. The caller is New or holds d.mu.
func (d *Daemon) report() {
	sp, _ := d.spec.Get()
	k, _ := d.keys.Get()
	s := &controlv1.State{Generation: sp.generation, Error: d.problem}
	for _, err := range []error{misplaced(k.node, sp, d.others(k.node)), misrole(k.node, sp), d.membership} {
		if s.Error == "" && err != nil {
			s.Error = errs.Text(err)
		}
	}
	if d.where != durable {
		s.Pending = pending(k)
	}
	t, _ := d.trust.Get()
	list, _ := d.list.Get()
	s.Conditions = conditions(k, t, s.Pending, clockTrouble(k, d.cfg.Now()), list != nil)
	s.Converged = sp.generation > 0 && len(s.Pending) == 0 && s.Error == ""
	d.state.Set(s)
	d.count.desired.Set(float64(sp.generation))
	d.count.observed.Set(float64(sp.generation))
	d.count.converged.Set(number(s.Converged))
}

// conditions are for the node's health, and to say what others wait for. heard: etcd has told the cluster's nodes. It is pure.
func conditions(k *keyring, t *trustv1.TrustState, pending []string, clock string, heard bool) []*controlv1.Condition {
	boot := &controlv1.Condition{Name: "bootstrap", Help: "bhctl bootstrap", Explains: true}
	if !t.GetBootstrapped() {
		boot.Trouble = "the cluster has no authorities yet: nobody has bootstrapped it"
		if k.worker() {
			boot.Trouble, boot.Help = "no control plane has told this node yet whom to trust", "bhctl get nodes"
			boot.Needs = []string{"networkd/address", "networkd/answers"}
		}
	}
	keys := &controlv1.Condition{Name: "keys", Trouble: strings.Join(pending, ", "), Help: "bhctl get volumes", Explains: true,
		Needs: []string{"storaged/STATE.mounted", "storaged/STATE.unlocks", "storaged/STATE.unlocked", "storaged/answers"}}
	nodes := &controlv1.Condition{Name: "nodes", Help: "bhctl etcd status", Needs: []string{"etcdd/member", "etcdd/answers"}}
	if k.cluster != nil && !heard {
		nodes.Trouble = "the cluster's etcd has not told yet which nodes there are; those of before count"
	}
	return []*controlv1.Condition{boot, {Name: "clock", Trouble: clock}, keys, nodes}
}

// clockTrouble says that the clock is wrong, if the authority of this node was made later than it says. It is pure.
func clockTrouble(k *keyring, now time.Time) string {
	a := k.os
	switch {
	case a != nil:
		return clock.Authority(now, a.cert.NotBefore, "the cluster's authority")
	case k.node != nil && k.node.osCA != nil:
		return clock.Authority(now, k.node.osCA.NotBefore, "the cluster's authority")
	}
	return ""
}

func pending(k *keyring) []string {
	if k.owned() {
		return []string{"keys move to /state/trustd when it is mounted"}
	}
	return []string{"keys wait for /state/trustd to be mounted"}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

type controlServer struct {
	controlv1.UnimplementedControlServer
	d *Daemon
}

func (s controlServer) SetSpec(_ context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	sp, err := parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if have, _ := s.d.spec.Get(); sp.generation < have.generation {
		return nil, errs.New(errs.Conflict, "generation %d is older than %d, which runs", sp.generation, have.generation)
	}
	s.d.spec.Set(sp)
	s.d.publish()
	s.d.report()
	return &controlv1.SetSpecResponse{}, nil
}

// PlanSpec has no steps but those that wait for STATE: names are used when the next certificate is signed. A document that makes the node another one than
// its cluster knows is invalid, so that it is not applied: it would get no certificates any more.
func (s controlServer) PlanSpec(_ context.Context, r *controlv1.PlanSpecRequest) (*controlv1.PlanSpecResponse, error) {
	sp, err := parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	out := &controlv1.PlanSpecResponse{}
	k, _ := s.d.keys.Get()
	for _, err := range []error{misplaced(k.node, sp, s.d.others(k.node)), misrole(k.node, sp)} {
		if err != nil {
			return nil, errs.New(errs.Invalid, "%w", err)
		}
	}
	if s.d.where != durable {
		out.Steps = append(out.Steps, pending(k)...)
	}
	have, _ := s.d.spec.Get()
	out.Steps = append(out.Steps, planNames(have, sp)...)
	return out, nil
}

// planNames says which names certificates gain and lose.
func planNames(have, want *spec) []string {
	var steps []string
	old, now := map[string]bool{}, map[string]bool{}
	for _, n := range have.allNames() {
		old[n] = true
	}
	for _, n := range want.allNames() {
		now[n] = true
		if !old[n] {
			steps = append(steps, "certificate name add "+n)
		}
	}
	for _, n := range have.allNames() {
		if !now[n] {
			steps = append(steps, "certificate name delete "+n)
		}
	}
	return steps
}

func (s controlServer) WatchState(_ *controlv1.WatchStateRequest, out grpc.ServerStreamingServer[controlv1.State]) error {
	return s.d.state.Watch(out.Context(), out.Send)
}

func (s controlServer) ReadMetrics(context.Context, *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	return &controlv1.ReadMetricsResponse{Families: s.d.cfg.Env.Metrics.Families()}, nil
}

func parse(s *controlv1.Spec) (*spec, error) {
	if s.GetGeneration() == 0 {
		return nil, errs.New(errs.Invalid, "spec: generation is 0, must be at least 1")
	}
	sp, err := parseSpec(s.GetGeneration(), s.GetDocuments())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	return sp, nil
}
