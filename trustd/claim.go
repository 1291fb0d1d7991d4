package trustd

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	// wrongProofs is how many wrong proofs are answered at once, each after wrongDelay: so many guesses per second.
	// A right proof never waits for them.
	wrongProofs = 4
	wrongDelay  = time.Second
	// ownerLife is that of the certificate from Claim: the operator renews it with IssueCertificate.
	ownerLife = 365 * day
)

type claimServer struct {
	trustv1.UnimplementedClaimServer
	d *Daemon
}

// Claim makes the caller the owner. Until the proof is checked nothing is said about why it is refused.
func (s claimServer) Claim(ctx context.Context, r *trustv1.ClaimRequest) (*trustv1.ClaimResponse, error) {
	resp, err := s.d.claim(r)
	if errs.Is(err, errs.Unauthenticated) {
		s.d.count.wrongClaims.Add(1)
		if err := s.d.delay(ctx); err != nil {
			return nil, err
		}
	}
	return resp, err
}

// delay holds back the answer to a wrong proof.
func (d *Daemon) delay(ctx context.Context) error {
	select {
	case d.slow <- struct{}{}:
		defer func() { <-d.slow }()
	case <-ctx.Done():
		return ctx.Err()
	}
	t := time.NewTimer(wrongDelay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Daemon) claim(r *trustv1.ClaimRequest) (*trustv1.ClaimResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k, _ := d.keys.Get(); k.owned() {
		return nil, errs.New(errs.Precondition, "this node has an owner already")
	}
	if d.code == "" {
		return nil, errs.New(errs.Unavailable, "the node has not found its storage yet; try again")
	}
	proof := claim.ClientProof(d.code, r.GetChannelBinding(), r.GetCsr())
	if len(r.GetChannelBinding()) != claim.BindingSize || !claim.Equal(proof, r.GetProof()) {
		return nil, errs.New(errs.Unauthenticated, "the claim code is wrong")
	}
	name := r.GetName()
	if name == "" {
		name = "admin"
	}
	if err := checkName(name); err != nil {
		return nil, errs.New(errs.Invalid, "name: %w", err)
	}
	csr, err := parseRequest(r.GetCsr())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	keys, data, err := newIdentity(d.cfg.Random, d.cfg.Now())
	if err != nil {
		return nil, err
	}
	owner := personal(name, []string{"admin"}, ownerLife)
	owner.old = true // while the clock is behind the authority nobody else is let in
	cert, err := keys.os.sign(csr.PublicKey, owner, d.cfg.Random, d.cfg.Now())
	if err != nil {
		return nil, err
	}
	if err := writeFile(d.folder(), identityFile, data); err != nil {
		return nil, err
	}
	code := d.code
	d.code = ""
	d.keys.Set(keys)
	d.publish()
	d.report()
	d.remember("owner", cert)
	d.forgetCode()
	d.log.Info("node claimed", "owner", name, "serial", cert.SerialNumber.Text(16))
	d.show("\n  This node is now owned by " + name + ".\n\n")
	return &trustv1.ClaimResponse{
		Ca: keys.os.cert.Raw, Certificate: cert.Raw,
		Proof: claim.ServerProof(code, r.GetChannelBinding(), keys.os.cert.Raw, cert.Raw),
	}, nil
}

// personal is a certificate for a person or program outside of the node. Roles are its organisations, each after "bulkhead:".
func personal(name string, roles []string, life time.Duration) leaf {
	l := leaf{subject: pkix.Name{CommonName: name}, usage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, life: life}
	for _, r := range roles {
		l.subject.Organization = append(l.subject.Organization, rolePrefix+r)
	}
	return l
}

const rolePrefix = "bulkhead:"
