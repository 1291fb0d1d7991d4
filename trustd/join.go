package trustd

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// nodeUsage is the only use of a node's own certificate: none in TLS, so that no server and no client takes it for somebody's.
// The number is of the range for examples (RFC 5612): nobody else gives it a meaning.
var nodeUsage = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 1}

type joinServer struct {
	trustv1.UnimplementedJoinServer
	d *Daemon
}

// Join lets a node into the cluster.
func (s joinServer) Join(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
	resp, err := s.d.admit(ctx, r)
	if err != nil {
		s.d.count.refusedJoins.Add(1)
		s.d.log.Warn("node not let in", "token", printable(r.GetTokenId()), "name", printable(r.GetName()), "address", printable(r.GetRemoteAddress()), "err", errs.Text(err))
		daemon.Tell(s.d.log, daemon.EventCluster, "not let in: "+errs.Text(err), fmt.Sprintf("a machine at %.60s was not let in as %.80q: %s", r.GetRemoteAddress(), r.GetName(), errs.Text(err)))
	} else {
		daemon.Tell(s.d.log, daemon.EventCluster, "let in: "+r.GetName()+" "+r.GetTokenId(), fmt.Sprintf("node %q joined as %s from %s, with join token %s", r.GetName(), resp.GetRole(), r.GetRemoteAddress(), r.GetTokenId()))
	}
	if errs.Is(err, errs.Unauthenticated) {
		if err := s.d.delay(ctx); err != nil {
			return nil, err
		}
	}
	return resp, err
}

// printable bounds what strangers can put into the log.
func printable(s string) string { return s[:min(len(s), 80)] }

// admit checks first that the caller knows the token's secret; until then nothing is said about why it is refused, and nothing read for it.
func (d *Daemon) admit(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
	list, k, err := d.roster()
	if err != nil {
		return nil, err
	}
	key, err := d.joinKey()
	if err != nil {
		return nil, err
	}
	secret, binding := join.Secret(key, r.GetTokenId()), r.GetChannelBinding()
	if len(binding) != join.BindingSize || !join.IsID(r.GetTokenId()) || len(r.GetCsr()) > maxRequest || len(r.GetName()) > 255 || len(r.GetSealKey()) != join.SealKeySize ||
		!join.Equal(join.NodeProof(secret, binding, r.GetName(), r.GetCsr(), r.GetSealKey()), r.GetProof()) {
		return nil, errs.New(errs.Unauthenticated, "the join token is wrong: it is mistyped, or of another cluster")
	}
	a, err := d.applicant(k, r)
	if err != nil {
		return nil, err
	}
	if err := d.placed(ctx); err != nil {
		return nil, err
	}
	n, after, err := list.Join(ctx, a, d.cfg.Now())
	if err != nil {
		return nil, err
	}
	resp, err := d.vouch(k, r, n, after)
	if err != nil {
		return nil, err
	}
	resp.Proof = join.ClusterProof(secret, binding, resp.OsCa, resp.Certificate, resp.Sealed)
	d.log.Info("node let in", "name", n.Name, "role", n.Role, "address", a.Address, "token", a.Token)
	return resp, nil
}

// placeTime is how long a new node waits for the control plane that lets it in to be on the cluster's list itself.
const placeTime = 5 * time.Second

// placed returns when this node is on the cluster's list. A node that was let in before would get a list without the only one that it can ask,
// would not know that one's certificate, and never hear of the cluster again.
func (d *Daemon) placed(ctx context.Context) error {
	late := time.NewTimer(placeTime)
	defer late.Stop()
	for {
		list, listed := d.list.Get()
		k, named := d.keys.Get()
		if list != nil && k.node != nil {
			if n, ok := list.Nodes[k.node.name]; ok && n.Key == k.node.digest() {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late.C:
			return errs.New(errs.Unavailable, "this control plane is not on the cluster's list yet: it needs a document with Machine.hostname, and its etcd; try again")
		case <-listed:
		case <-named:
		}
	}
}

// vouch is what a node gets that was let in: the cluster's word for it, and its keys if it is a control plane.
func (d *Daemon) vouch(k *keyring, r *trustv1.JoinRequest, n roster.Node, after *roster.State) (*trustv1.JoinResponse, error) {
	pub, err := join.ParseKey(n.PublicKey)
	if err != nil {
		return nil, err
	}
	cert, err := k.os.sign(pub, leaf{subject: pkix.Name{CommonName: peer.NodePrefix + n.Name}, private: nodeUsage, life: day}, d.cfg.Random, d.cfg.Now())
	if err != nil {
		return nil, err
	}
	resp := &trustv1.JoinResponse{OsCa: k.os.cert.Raw, Certificate: cert.Raw, Role: n.Role, State: k.heard(after)}
	if n.Role == roster.ControlPlane {
		if resp.Sealed, err = k.sealFor(r); err != nil {
			return nil, err
		}
	}
	d.remember("node", cert)
	return resp, nil
}

// applicant checks what was asked for by somebody who knows the secret.
func (d *Daemon) applicant(k *keyring, r *trustv1.JoinRequest) (roster.Applicant, error) {
	if err := d.checkFree(k, r.GetName()); err != nil {
		return roster.Applicant{}, err
	}
	csr, err := parseRequest(r.GetCsr())
	if err != nil {
		return roster.Applicant{}, errs.New(errs.Invalid, "%w", err)
	}
	if _, err := join.ParseKey(csr.RawSubjectPublicKeyInfo); err != nil {
		return roster.Applicant{}, errs.New(errs.Invalid, "csr: %w", err)
	}
	if _, err := join.Seal(r.GetSealKey(), r.GetTokenId(), nil); err != nil { // before the token is used up
		return roster.Applicant{}, errs.New(errs.Invalid, "%w", err)
	}
	address, err := roster.Address(r.GetRemoteAddress())
	if err != nil {
		return roster.Applicant{}, errs.New(errs.Invalid, "remote address: %w", err)
	}
	return roster.Applicant{
		Token: r.GetTokenId(), Name: r.GetName(), Address: address,
		Key: join.Digest(csr.RawSubjectPublicKeyInfo), PublicKey: csr.RawSubjectPublicKeyInfo,
	}, nil
}

// sealFor encrypts the cluster's keys for a control plane that joins.
func (k *keyring) sealFor(r *trustv1.JoinRequest) ([]byte, error) {
	keys, err := k.keys()
	if err != nil {
		return nil, err
	}
	plain, err := json.Marshal(keys)
	if err != nil {
		return nil, err
	}
	return join.Seal(r.GetSealKey(), r.GetTokenId(), plain)
}

// heard is what other nodes hear of the cluster from this one.
func (k *keyring) heard(s *roster.State) *trustv1.TrustState {
	t := k.trust()
	t.Nodes, t.Revoked = s.Cluster(), s.Revoked
	return t
}

// checkVouched checks the cluster's word for a node: the certificate is for this key and name, of that authority, for no use in TLS.
func checkVouched(ca, cert *x509.Certificate, name string, public []byte) error {
	switch {
	case !ca.IsCA:
		return errs.New(errs.Denied, "the cluster's authority is none")
	case cert.CheckSignatureFrom(ca) != nil:
		return errs.New(errs.Denied, "the node's certificate is not signed by the cluster's authority")
	case string(cert.RawSubjectPublicKeyInfo) != string(public) || cert.Subject.CommonName != peer.NodePrefix+name:
		return errs.New(errs.Denied, "the cluster vouched for another node than this one")
	}
	return nil
}
