package trustd

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// tpmOf is what trustd sees of storaged: a real TPM behind its service.
type tpmOf struct {
	storagev1.UnimplementedAttestationServer
	mu sync.Mutex
	m  *testtpm.TPM // guarded by mu; nil: the machine has none
}

func (s *tpmOf) Describe(context.Context, *storagev1.DescribeRequest) (*storagev1.DescribeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		return nil, errs.New(errs.Precondition, "the machine has no TPM 2.0")
	}
	d, err := attest.Describe(s.m)
	return &storagev1.DescribeResponse{EndorsementKey: d.EK, EndorsementCertificate: d.Certificate, AttestationKey: d.AK}, err
}

func (s *tpmOf) Prove(_ context.Context, r *storagev1.ProveRequest) (*storagev1.ProveResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	secret, q, err := attest.Prove(s.m, attest.Credential{Blob: r.GetCredential(), Secret: r.GetEncryptedSecret()}, r.GetQualifier())
	out := &storagev1.ProveResponse{Secret: secret, Quote: q.Attest, Signature: q.Signature}
	for _, v := range q.Values {
		out.Pcrs = append(out.Pcrs, v[:])
	}
	return out, err
}

// withTPM gives the box a TPM, and returns the fingerprint of its endorsement key.
func (b *box) withTPM(m *testtpm.TPM) string {
	b.t.Helper()
	b.serveUnix("storaged", func(s *grpc.Server) { storagev1.RegisterAttestationServer(s, &tpmOf{m: m}) })
	if m == nil {
		return ""
	}
	d, err := attest.Describe(m)
	b.must(err)
	return attest.Fingerprint(d.EK)
}

// invitation is what an operator gives a node that is to join the box's cluster by its TPM.
func (b *box) invitation() string {
	k, _ := b.d.keys.Get()
	return attest.Invitation(fingerprintOf(k.os.cert.Raw))
}

func fingerprintOf(der []byte) string {
	d := sha256.Sum256(der)
	return hex.EncodeToString(d[:])
}

func (b *box) allow(r *trustv1.AllowAttestationRequest) string {
	b.t.Helper()
	resp, err := b.membership().AllowAttestation(b.admin(), r)
	b.must(err)
	return resp.GetId()
}

// Machines join by their TPMs: no secret is made for them. What they showed is on the list; one that was reset comes back as the node that it was, and as no other.
func TestJoinByTPM(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	worker, second := testtpm.Start(t), testtpm.Start(t)
	n3 := l.box("n3", "3")
	ek := n3.withTPM(worker)
	waitSettled(t, n3.d)
	if _, err := n3.tryJoin(n3.joinRequest("n3", n1.invitation(), n1)); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "bhctl attest allow --ek "+ek) {
		t.Fatalf("who is not allowed: %v", err)
	}
	worker.Tool("tpm2_pcrextend", "7:sha256="+strings.Repeat("ab", 32))
	pcr7 := pcr(t, worker, 0)
	id := n1.allow(&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: strings.ToUpper(ek), Pcr7: pcr7})
	n3.join(n1.invitation(), n1)
	n1.knows("n1", "n3")
	if _, err := n3.sign(uid.Apid, "apid-node", x509.CertificateRequest{}); err != nil {
		t.Errorf("the node gets no certificate: %v", err)
	}
	n2 := l.box("n2", "2")
	n1.allow(&trustv1.AllowAttestationRequest{Role: "controlplane", Name: "n2", EndorsementKey: n2.withTPM(second)})
	n2.join(n1.invitation(), n1)
	n2.knows("n1", "n2", "n3")
	if _, err := n2.sign(uid.Etcdd, "etcd-peer", x509.CertificateRequest{}); err != nil {
		t.Errorf("the control plane has not got the cluster's keys: %v", err)
	}
	list, err := n2.membership().ListAttestations(n2.admin(), &trustv1.ListAttestationsRequest{})
	n2.must(err)
	if len(list.GetAttestations()) != 2 || len(list.GetMembers()) != 2 {
		t.Fatalf("the list: %v", list)
	}
	for _, a := range list.GetAttestations() {
		if a.GetState() != "used" || a.GetMadeBy() != "ann" || a.GetId() == id && (a.GetUsedBy() != "n3" || a.GetPcr7() != pcr7) {
			t.Errorf("attestation: %v", a)
		}
	}
	members, err := n1.membership().ListMembers(n1.admin(), &trustv1.ListMembersRequest{})
	n1.must(err)
	if got := members.GetMembers()[2].GetAttested(); got.GetId() != id || got.GetEndorsementKey() != ek || got.GetPcr7() != pcr7 || len(got.GetPcr11()) != 64 || got.GetAt() == nil || members.GetMembers()[0].GetAttested() != nil {
		t.Errorf("what n3 showed: %v", got)
	}

	// The machine was reset: it has another key, and comes back.
	before := n3.key()
	n3.stop()
	again := l.box("n3", "4")
	again.withTPM(worker)
	again.join(n1.invitation(), n1)
	if again.key() == before {
		t.Error("the machine that was reset has its old key")
	}
	n1.until("took the new key", func(s *trustv1.TrustState) bool {
		return len(s.GetNodes()) == 3 && s.GetNodes()[2].GetKey() == again.key()
	})
	other := l.box("n4", "5")
	other.withTPM(worker)
	waitSettled(t, other.d)
	if _, err := other.tryJoin(other.joinRequest("n4", n1.invitation(), n1)); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), `was used by node "n3"; a TPM may come back under that name only`) {
		t.Errorf("under another name: %v", err)
	}
	_, err = n1.membership().RevokeAttestation(n1.admin(), &trustv1.RevokeAttestationRequest{Id: id})
	n1.must(err)
	last := l.box("n3", "6")
	last.withTPM(worker)
	waitSettled(t, last.d)
	if _, err := last.tryJoin(last.joinRequest("n3", n1.invitation(), n1)); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), id+" was revoked") {
		t.Errorf("after it was revoked: %v", err)
	}
	if _, err := n1.membership().RevokeAttestation(n1.admin(), &trustv1.RevokeAttestationRequest{Id: "nothing"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("revoked what is not: %v", err)
	}
}

// pcr is one of attest.PCRs as it is now.
func pcr(t testing.TB, m *testtpm.TPM, i int) string {
	t.Helper()
	d, err := attest.Describe(m)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := attest.ParseAK(d.AK)
	if err != nil {
		t.Fatal(err)
	}
	_, c, err := attest.Challenge(rand.Reader, d.EK, ak)
	if err != nil {
		t.Fatal(err)
	}
	_, q, err := attest.Prove(m, c, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	return q.Values[i].String()
}

// applicantByTPM is a machine that calls a control plane, as its apid passes it on.
type applicantByTPM struct {
	b    *box // the control plane
	m    *testtpm.TPM
	d    attest.Device
	csr  []byte
	seal []byte
}

func (b *box) applicant(m *testtpm.TPM) *applicantByTPM {
	b.t.Helper()
	d, err := attest.Describe(m)
	b.must(err)
	_, csr := request(b.t, x509.CertificateRequest{})
	seal, err := join.NewSealKey()
	b.must(err)
	return &applicantByTPM{b, m, d, csr, seal.PublicKey().Bytes()}
}

func (a *applicantByTPM) challenge(name string) (*trustv1.AttestChallengeResponse, error) {
	return trustv1.NewJoinClient(a.b.conn[uid.Apid]).Challenge(a.b.t.Context(), &trustv1.AttestChallengeRequest{
		Name: name, EndorsementKey: a.d.EK, EndorsementCertificate: a.d.Certificate, AttestationKey: a.d.AK, RemoteAddress: "10.5.0.9",
	})
}

func (a *applicantByTPM) prove(name string, c *trustv1.AttestChallengeResponse) *trustv1.JoinAttestedRequest {
	a.b.t.Helper()
	secret, q, err := attest.Prove(a.m, attest.Credential{Blob: c.GetCredential(), Secret: c.GetEncryptedSecret()}, attest.Qualifier(c.GetNonce(), binding, name, a.csr, a.seal))
	a.b.must(err)
	r := &trustv1.JoinAttestedRequest{
		Join:   &trustv1.JoinRequest{TokenId: c.GetId(), Name: name, Csr: a.csr, SealKey: a.seal, ChannelBinding: binding, RemoteAddress: "10.5.0.9"},
		Ticket: c.GetTicket(), Secret: secret, Quote: q.Attest, Signature: q.Signature,
	}
	for _, v := range q.Values {
		r.Pcrs = append(r.Pcrs, v[:])
	}
	return r
}

func (a *applicantByTPM) join(r *trustv1.JoinAttestedRequest) (*trustv1.JoinAttestedResponse, error) {
	return trustv1.NewJoinClient(a.b.conn[uid.Apid]).JoinAttested(a.b.t.Context(), r)
}

// Whatever does not fit is refused in one sentence, and nobody is on the list for it.
func TestAttestationRefused(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	mine, theirs := testtpm.Start(t), testtpm.Start(t)
	a, other := n1.applicant(mine), n1.applicant(theirs)
	ek := attest.Fingerprint(a.d.EK)
	id := n1.allow(&trustv1.AllowAttestationRequest{Role: "worker", Name: "n2", EndorsementKey: ek, Pcr7: pcr(t, mine, 0)})
	c, err := a.challenge("n2")
	n1.must(err)
	first := a.prove("n2", c)
	next, err := a.challenge("n2")
	n1.must(err)
	_, foreign, err := attest.Prove(theirs, foreignCredential(t, other.d), attest.Qualifier(c.GetNonce(), binding, "n2", a.csr, a.seal))
	n1.must(err)
	mine.Tool("tpm2_pcrextend", "7:sha256="+strings.Repeat("cd", 32))
	started := a.prove("n2", next)
	_, stolen := request(t, x509.CertificateRequest{})
	var wait sync.WaitGroup
	for _, tc := range []struct {
		name  string
		of    *trustv1.JoinAttestedRequest
		spoil func(*trustv1.JoinAttestedRequest)
		err   string
	}{
		{"on another connection", first, func(r *trustv1.JoinAttestedRequest) { r.Join.ChannelBinding = make([]byte, 32) }, "an old quote sent again"},
		{"on no connection", first, func(r *trustv1.JoinAttestedRequest) { r.Join.ChannelBinding = nil }, "tied to no connection"},
		{"a quote for an older nonce", first, func(r *trustv1.JoinAttestedRequest) { r.Ticket, r.Secret = next.GetTicket(), started.Secret }, "an old quote sent again"},
		{"the secret of another challenge", first, func(r *trustv1.JoinAttestedRequest) { r.Secret = started.Secret }, "has not decrypted the challenge"},
		{"no secret", first, func(r *trustv1.JoinAttestedRequest) { r.Secret = nil }, "has not decrypted the challenge"},
		{"another key to certify", first, func(r *trustv1.JoinAttestedRequest) { r.Join.Csr = stolen }, "another nonce, connection, name or key"},
		{"another key to seal to", first, func(r *trustv1.JoinAttestedRequest) { r.Join.SealKey = make([]byte, 32) }, "another nonce, connection, name or key"},
		{"another name", first, func(r *trustv1.JoinAttestedRequest) { r.Join.Name = "n3" }, `for a node called "n2"`},
		{"another attestation", first, func(r *trustv1.JoinAttestedRequest) { r.Join.TokenId = "0123456789" }, "for attestation " + id},
		{"a quote by another TPM", first, func(r *trustv1.JoinAttestedRequest) { r.Quote, r.Signature = foreign.Attest, foreign.Signature }, "another key than the attestation key"},
		{"PCRs that were not quoted", first, func(r *trustv1.JoinAttestedRequest) { r.Pcrs[0] = slices.Repeat([]byte{1}, 32) }, "not those that the TPM has quoted"},
		{"started otherwise", started, nil, "attestation " + id + ": PCR 7 (Secure Boot) is " + pcr(t, mine, 0)},
		{"a ticket of nobody's", first, func(r *trustv1.JoinAttestedRequest) { r.Ticket = make([]byte, 100) }, "the ticket is none of this cluster's"},
	} {
		r := proto.CloneOf(tc.of)
		if tc.spoil != nil {
			tc.spoil(r)
		}
		wait.Go(func() { // each takes a second
			if _, err := a.join(r); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), tc.err) {
				t.Errorf("%s: %v, want %q", tc.name, err, tc.err)
			}
		})
	}
	wait.Go(func() {
		if _, err := other.challenge("n2"); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "bhctl attest allow --ek "+attest.Fingerprint(other.d.EK)) {
			t.Errorf("another TPM: %v", err)
		}
	})
	wait.Go(func() {
		if _, err := a.challenge("n3"); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), `is for a node called "n2", not "n3"`) {
			t.Errorf("another name: %v", err)
		}
	})
	wait.Wait()
	n1.knows("n1")
	resp, err := a.join(first)
	n1.must(err)
	if _, err := a.join(first); err != nil { // the answer may have been lost
		t.Errorf("the same once more: %v", err)
	}
	n1.knows("n1", "n2")
	checkAnswer(t, n1, resp)
}

// checkAnswer: a node believes the answer on this connection, of this cluster, and otherwise not.
func checkAnswer(t *testing.T, n1 *box, resp *trustv1.JoinAttestedResponse) {
	t.Helper()
	k, _ := n1.d.keys.Get()
	ca := fingerprintOf(k.os.cert.Raw)
	if inner, err := checkWord(resp, []string{ca}, binding); err != nil || inner.GetRole() != "worker" || len(inner.GetSealed()) != 0 {
		t.Errorf("the cluster's word: %v, %v", inner, err)
	}
	changed := proto.CloneOf(resp)
	inner := &trustv1.JoinResponse{}
	n1.must(proto.Unmarshal(resp.GetAnswer(), inner))
	inner.State.TokenKeys = nil
	changed.Answer, _ = proto.Marshal(inner)
	mine, _, err := newNodeKey(rand.Reader)
	n1.must(err)
	forged := proto.CloneOf(changed)
	forged.Signature, err = ecdsa.SignASN1(rand.Reader, mine, attest.Word(binding, forged.Answer))
	n1.must(err)
	for name, c := range map[string]struct {
		r       *trustv1.JoinAttestedResponse
		ca      string
		binding []byte
		err     string
	}{
		"another cluster":    {resp, strings.Repeat("0", 64), binding, "of another cluster, or somebody is in between"},
		"another connection": {resp, ca, make([]byte, 32), "not signed by its authority"},
		"changed":            {changed, ca, binding, "not signed by its authority"},
		"signed by another":  {forged, ca, binding, "not signed by its authority"},
	} {
		if _, err := checkWord(c.r, []string{c.ca}, c.binding); err == nil || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func foreignCredential(t *testing.T, d attest.Device) attest.Credential {
	t.Helper()
	ak, err := attest.ParseAK(d.AK)
	if err != nil {
		t.Fatal(err)
	}
	_, c, err := attest.Challenge(rand.Reader, d.EK, ak)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A proof goes to whichever control plane answers: none keeps anything for a stranger.
func TestChallengeAtAnotherControlPlane(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	a := n1.applicant(testtpm.Start(t))
	n1.allow(&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: attest.Fingerprint(a.d.EK)})
	c, err := a.challenge("n9")
	n1.must(err)
	if r, err := trustv1.NewJoinClient(n2.conn[uid.Apid]).JoinAttested(t.Context(), a.prove("n9", c)); err != nil || len(r.GetAnswer()) == 0 {
		t.Errorf("at another control plane: %v", err)
	}
	n2.knows("n1", "n2", "n9")
}

// What an administrator asks for is checked.
func TestAllowAttestation(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	ek := strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		r    *trustv1.AllowAttestationRequest
		kind errs.Kind
		err  string
	}{
		"no role":           {&trustv1.AllowAttestationRequest{EndorsementKey: ek}, errs.Invalid, `allowed are "controlplane" and "worker"`},
		"whoever":           {&trustv1.AllowAttestationRequest{Role: "worker", Pcr7: ek}, errs.Invalid, "it must be known whose TPM it is"},
		"both":              {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, EndorsementAuthorities: "x"}, errs.Invalid, "give one of them"},
		"a short key":       {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: "ab"}, errs.Invalid, "endorsement_key: \"ab\" is no SHA-256: allowed are 64 hexadecimal digits"},
		"a strange PCR":     {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, Pcr11: "x"}, errs.Invalid, "pcr11"},
		"no such name":      {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, Name: "N 1"}, errs.Invalid, "name"},
		"a name of all":     {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, Name: "kubernetes"}, errs.Invalid, "own names"},
		"a name in use":     {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, Name: "n1"}, errs.Exists, `called "n1" already`},
		"for ever":          {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek, TtlSeconds: 367 * 86400}, errs.Invalid, "ttl_seconds"},
		"any of that maker": {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementAuthorities: "x"}, errs.Invalid, "every machine with a TPM of that maker would do"},
		"no authority":      {&trustv1.AllowAttestationRequest{Role: "worker", EndorsementAuthorities: "x", ImageKey: ek}, errs.Invalid, "0 certificates in PEM"},
	} {
		if _, err := n1.membership().AllowAttestation(n1.admin(), c.r); !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	id := n1.allow(&trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek})
	if _, err := n1.membership().AllowAttestation(n1.admin(), &trustv1.AllowAttestationRequest{Role: "worker", EndorsementKey: ek}); !errs.Is(err, errs.Exists) || !strings.Contains(errs.Text(err), "bhctl attest revoke "+id) {
		t.Errorf("twice: %v", err)
	}
	n3 := l.box("n3", "3")
	n3.withTPM(nil)
	waitSettled(t, n3.d)
	if _, err := n3.tryJoin(n3.joinRequest("n3", n1.invitation(), n1)); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "this node cannot join by its TPM: the machine has no TPM 2.0") {
		t.Errorf("without a TPM: %v", err)
	}
}
