package trustd

import (
	"context"
	"crypto/ecdsa"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

const (
	allowLife    = day
	maxAllowLife = 366 * day
	// maxAuthorities is in bytes.
	maxAuthorities = 32 << 10
)

// refusedAttestation notes that a machine was not let in by its TPM, and holds the answer back if it tried to prove something.
func (d *Daemon) refusedAttestation(ctx context.Context, step, id, name, address string, device []byte, err error) error {
	d.count.refusedJoins.Add(1)
	d.log.Warn("node not let in by its TPM", "step", step, "attestation", printable(id), "name", printable(name), "address", printable(address), "tpm", attest.Fingerprint(device), "err", errs.Text(err))
	daemon.Tell(d.log, daemon.EventCluster, "not let in by its TPM: "+step, fmt.Sprintf("a machine at %.60s, TPM %s, was not let in as %.80q: %s", address, attest.Fingerprint(device), name, errs.Text(err)))
	if errs.Is(err, errs.Denied) {
		if err := d.delay(ctx); err != nil {
			return err
		}
	}
	return err
}

// Challenge is the first half of a join by a TPM. It keeps nothing: what must be remembered is in the ticket.
func (s joinServer) Challenge(ctx context.Context, r *trustv1.AttestChallengeRequest) (*trustv1.AttestChallengeResponse, error) {
	resp, err := s.d.challenge(ctx, r)
	if err != nil {
		return nil, s.d.refusedAttestation(ctx, "challenge", "", r.GetName(), r.GetRemoteAddress(), r.GetEndorsementKey(), err)
	}
	return resp, nil
}

func (d *Daemon) challenge(ctx context.Context, r *trustv1.AttestChallengeRequest) (*trustv1.AttestChallengeResponse, error) {
	list, k, err := d.roster()
	if err != nil {
		return nil, err
	}
	if err := d.checkFree(k, r.GetName()); err != nil {
		return nil, err
	}
	key, err := d.joinKey()
	if err != nil {
		return nil, err
	}
	ak, err := attest.ParseAK(r.GetAttestationKey())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	secret, credential, err := attest.Challenge(d.cfg.Random, r.GetEndorsementKey(), ak) // before anything is read for a stranger: it checks the key
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	select {
	case d.lookups <- struct{}{}:
		defer func() { <-d.lookups }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	state, err := list.Read(ctx)
	if err != nil {
		return nil, err
	}
	now := d.cfg.Now()
	a, err := state.Find(attest.Device{EK: r.GetEndorsementKey(), Certificate: r.GetEndorsementCertificate(), AK: r.GetAttestationKey()}, r.GetName(), now)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, attest.NonceSize)
	if _, err := io.ReadFull(d.cfg.Random, nonce); err != nil {
		return nil, err
	}
	ticket, err := attest.Ticket{
		Record: a.ID, Name: r.GetName(), EK: r.GetEndorsementKey(), AK: r.GetAttestationKey(), Nonce: nonce, Secret: secret, Expires: now.Add(attest.TicketLife),
	}.Seal(key, d.cfg.Random)
	return &trustv1.AttestChallengeResponse{Ticket: ticket, Nonce: nonce, Credential: credential.Blob, EncryptedSecret: credential.Secret, Id: a.ID}, err
}

// JoinAttested is the second half.
func (s joinServer) JoinAttested(ctx context.Context, r *trustv1.JoinAttestedRequest) (*trustv1.JoinAttestedResponse, error) {
	resp, t, err := s.d.admitAttested(ctx, r)
	if err != nil {
		j := r.GetJoin()
		return nil, s.d.refusedAttestation(ctx, "proof", t.Record, j.GetName(), j.GetRemoteAddress(), t.EK, err)
	}
	return resp, nil
}

func (d *Daemon) admitAttested(ctx context.Context, r *trustv1.JoinAttestedRequest) (*trustv1.JoinAttestedResponse, attest.Ticket, error) {
	list, k, err := d.roster()
	if err != nil {
		return nil, attest.Ticket{}, err
	}
	key, err := d.joinKey()
	if err != nil {
		return nil, attest.Ticket{}, err
	}
	now := d.cfg.Now()
	t, err := attest.OpenTicket(key, r.GetTicket(), now)
	if err != nil {
		return nil, t, errs.New(errs.Denied, "%w", err)
	}
	seen, err := proved(t, r, now)
	if err != nil {
		return nil, t, err
	}
	a, err := d.applicant(k, r.GetJoin())
	if err != nil {
		return nil, t, err
	}
	a.Token = t.Record
	if err := d.checkPolicy(ctx, list, t, r, &seen); err != nil {
		return nil, t, err
	}
	if err := d.placed(ctx); err != nil {
		return nil, t, err
	}
	n, after, err := list.JoinAttested(ctx, a, seen, now, func(n roster.Node) error { return d.checkNoMember(ctx, n) })
	if err != nil {
		return nil, t, err
	}
	d.log.Info("node let in by its TPM", "name", n.Name, "role", n.Role, "address", a.Address, "attestation", t.Record, "shown", seen.Describe())
	daemon.Tell(d.log, daemon.EventCluster, "let in: "+n.Name+" "+t.Record, fmt.Sprintf("node %q joined as %s from %s, by its TPM: %s", n.Name, n.Role, a.Address, seen.Describe()))
	resp, err := d.signed(k, r.GetJoin(), n, after)
	return resp, t, err
}

// proved checks a machine's proof, and returns what it shows. It is pure.
func proved(t attest.Ticket, r *trustv1.JoinAttestedRequest, now time.Time) (seen roster.Attested, err error) {
	j := r.GetJoin()
	switch {
	case len(j.GetChannelBinding()) != join.BindingSize:
		return seen, errs.New(errs.Denied, "the call is tied to no connection")
	case j.GetName() != t.Name:
		return seen, errs.New(errs.Denied, "the challenge was for a node called %q, not %.64q", t.Name, j.GetName())
	case j.GetTokenId() != t.Record:
		return seen, errs.New(errs.Denied, "the challenge was for attestation %s, not %.64q", t.Record, j.GetTokenId())
	case len(t.Secret) != attest.SecretSize || !join.Equal(t.Secret, r.GetSecret()):
		return seen, errs.New(errs.Denied, "the machine has not decrypted the challenge: its TPM does not have the endorsement key that it showed, or not this attestation key")
	case len(r.GetPcrs()) != len(attest.PCRs) || len(j.GetCsr()) > maxRequest || len(j.GetSealKey()) != join.SealKeySize:
		return seen, errs.New(errs.Invalid, "%d PCRs, csr of %d bytes, seal_key of %d; allowed are %d, at most %d, %d", len(r.GetPcrs()), len(j.GetCsr()), len(j.GetSealKey()), len(attest.PCRs), maxRequest, join.SealKeySize)
	}
	ak, err := attest.ParseAK(t.AK)
	if err != nil {
		return seen, errs.New(errs.Invalid, "%w", err)
	}
	q := attest.Quote{Attest: r.GetQuote(), Signature: r.GetSignature()}
	for i, v := range r.GetPcrs() {
		if len(v) != len(q.Values[i]) {
			return seen, errs.New(errs.Invalid, "pcrs: one has %d bytes; allowed are %d", len(v), len(q.Values[i]))
		}
		q.Values[i] = pcrpolicy.Digest(v)
	}
	if err := ak.Check(q, attest.Qualifier(t.Nonce, j.GetChannelBinding(), j.GetName(), j.GetCsr(), j.GetSealKey())); err != nil {
		return seen, errs.New(errs.Denied, "%w", err)
	}
	return roster.Attested{Allowance: t.Record, EK: attest.Fingerprint(t.EK), PCRs: q.Values, At: now}, nil
}

// checkPolicy checks what the machine was started with. What allows it cannot change but to be revoked or used, which the transaction looks at.
func (d *Daemon) checkPolicy(ctx context.Context, list roster.Roster, t attest.Ticket, r *trustv1.JoinAttestedRequest, seen *roster.Attested) error {
	state, err := list.Read(ctx)
	if err != nil {
		return err
	}
	p := state.Allowed[t.Record].Policy // one that is no more is refused in the transaction
	m := r.GetImage()
	image := attest.Image{Key: m.GetKey(), Signature: m.GetSignature(), Epoch: int(m.GetEpoch())}
	if len(image.Key)+len(image.Signature) > attest.MaxImage || len(m.GetPolicy()) != 0 && len(m.GetPolicy()) != len(image.Policy) {
		return errs.New(errs.Invalid, "image: a key of %d bytes, a signature of %d and a policy of %d; allowed are %d in all, and %d", len(m.GetKey()), len(m.GetSignature()), len(m.GetPolicy()), attest.MaxImage, len(image.Policy))
	}
	copy(image.Policy[:], m.GetPolicy())
	if err := p.Check(seen.PCRs, image); err != nil {
		return errs.New(errs.Denied, "attestation %s: %w", t.Record, err)
	}
	if p.ImageKey != "" {
		seen.ImageKey, seen.Epoch = p.ImageKey, image.Epoch
	}
	return nil
}

// signed is the cluster's answer to a machine that was let in, under the signature of its authority.
func (d *Daemon) signed(k *keyring, j *trustv1.JoinRequest, n roster.Node, after *roster.State) (*trustv1.JoinAttestedResponse, error) {
	inner, err := d.vouch(k, j, n, after)
	if err != nil {
		return nil, err
	}
	answer, err := proto.Marshal(inner)
	if err != nil {
		return nil, err
	}
	sig, err := ecdsa.SignASN1(d.cfg.Random, k.os.key, attest.Word(j.GetChannelBinding(), answer))
	return &trustv1.JoinAttestedResponse{Answer: answer, Signature: sig}, err
}

func (s membershipServer) AllowAttestation(ctx context.Context, r *trustv1.AllowAttestationRequest) (*trustv1.AllowAttestationResponse, error) {
	list, k, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	a, err := s.d.allowance(k, r)
	if err != nil {
		return nil, err
	}
	life, err := lifetime(r.GetTtlSeconds(), allowLife, maxAllowLife)
	if err != nil {
		return nil, err
	}
	if a.ID, err = join.NewID(s.d.cfg.Random); err != nil {
		return nil, err
	}
	now := s.d.cfg.Now()
	a.Expires, a.MadeBy, a.State = now.Add(life).Truncate(time.Second), peer.CallerFrom(ctx).Name, roster.Unused
	if err := list.Allow(ctx, a, now); err != nil {
		return nil, err
	}
	s.d.log.Info("attestation allowed", "id", a.ID, "role", a.Role, "name", a.Name, "tpm", a.EK, "expires", a.Expires.Format(time.RFC3339), "by", a.MadeBy)
	return &trustv1.AllowAttestationResponse{Id: a.ID, Expires: timestamppb.New(a.Expires)}, nil
}

// allowance checks what an administrator asks for.
func (d *Daemon) allowance(k *keyring, r *trustv1.AllowAttestationRequest) (a roster.Allowance, err error) {
	a.Role, a.Name, a.Authorities = r.GetRole(), r.GetName(), r.GetEndorsementAuthorities()
	if a.Role != roster.ControlPlane && a.Role != roster.Worker {
		return a, errs.New(errs.Invalid, "role: %.64q; allowed are %q and %q", a.Role, roster.ControlPlane, roster.Worker)
	}
	if a.Name != "" {
		if err := d.checkFree(k, a.Name); err != nil {
			return a, err
		}
	}
	for _, f := range []struct {
		name, text string
		to         *string
	}{
		{"endorsement_key", r.GetEndorsementKey(), &a.EK}, {"pcr7", r.GetPcr7(), &a.Policy.PCR7},
		{"pcr11", r.GetPcr11(), &a.Policy.PCR11}, {"image_key", r.GetImageKey(), &a.Policy.ImageKey},
	} {
		if f.text == "" {
			continue
		}
		if *f.to, err = attest.ParseDigest(f.text); err != nil {
			return a, errs.New(errs.Invalid, "%s: %w", f.name, err)
		}
	}
	switch {
	case (a.EK == "") == (a.Authorities == ""):
		return a, errs.New(errs.Invalid, "endorsement_key, endorsement_authorities: give one of them: anybody's software can claim any PCR, so it must be known whose TPM it is")
	case len(a.Authorities) > maxAuthorities:
		return a, errs.New(errs.Invalid, "endorsement_authorities: %d bytes; allowed are %d", len(a.Authorities), maxAuthorities)
	case a.Authorities != "" && a.Policy.PCR11 == "" && a.Policy.ImageKey == "":
		return a, errs.New(errs.Invalid, "endorsement_authorities: every machine with a TPM of that maker would do; give pcr11 or image_key too, or the endorsement_key")
	}
	if a.Authorities != "" {
		if _, err := attest.ParseAuthorities(a.Authorities); err != nil {
			return a, errs.New(errs.Invalid, "endorsement_authorities: %w", err)
		}
	}
	return a, nil
}

func (s membershipServer) ListAttestations(ctx context.Context, _ *trustv1.ListAttestationsRequest) (*trustv1.ListAttestationsResponse, error) {
	state, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	out := &trustv1.ListAttestationsResponse{}
	for _, id := range slices.Sorted(maps.Keys(state.Allowed)) {
		a := state.Allowed[id]
		t := &trustv1.Attestation{
			Id: id, Role: a.Role, Name: a.Name, EndorsementKey: a.EK, Pcr7: a.Policy.PCR7, Pcr11: a.Policy.PCR11, ImageKey: a.Policy.ImageKey,
			Expires: timestamppb.New(a.Expires), State: a.State, UsedBy: a.UsedBy, MadeBy: a.MadeBy,
		}
		if all, err := attest.ParseAuthorities(a.Authorities); err == nil {
			for _, c := range all {
				t.EndorsementAuthorities = append(t.EndorsementAuthorities, c.Subject.String())
			}
		}
		out.Attestations = append(out.Attestations, t)
	}
	for _, m := range members(state) {
		if m.GetAttested() != nil {
			out.Members = append(out.Members, m)
		}
	}
	return out, nil
}

func (s membershipServer) RevokeAttestation(ctx context.Context, r *trustv1.RevokeAttestationRequest) (*trustv1.RevokeAttestationResponse, error) {
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	if err := list.Disallow(ctx, r.GetId(), s.d.cfg.Now()); err != nil {
		return nil, err
	}
	s.d.log.Info("attestation revoked", "id", printable(r.GetId()), "by", peer.CallerFrom(ctx).Name)
	return &trustv1.RevokeAttestationResponse{}, nil
}

// shown is the evidence for people.
func shown(a *roster.Attested) *trustv1.Attested {
	if a == nil {
		return nil
	}
	return &trustv1.Attested{
		Id: a.Allowance, EndorsementKey: a.EK, Pcr7: a.PCRs[0].String(), Pcr11: a.PCRs[1].String(), Pcr12: a.PCRs[2].String(),
		ImageKey: a.ImageKey, Epoch: uint32(a.Epoch), At: timestamppb.New(a.At),
	}
}
