package trustd

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
)

// tpmPatience is how long this machine's TPM may take: some need seconds for each key.
const tpmPatience = 20 * time.Second

// asking is how one control plane is asked to let this node in. It returns what the node then is, with its certificate.
type asking func(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, endpoint string) (*keyring, []byte, error)

// asking tells by what the operator gave how the node joins: by a token, or by its TPM.
func (d *Daemon) asking(ctx context.Context, token string) (asking, error) {
	cas, ok := attest.ParseInvitation(token)
	if !ok {
		id, secret, err := join.Parse(token)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%w", err)
		}
		return func(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, endpoint string) (*keyring, []byte, error) {
			return d.askToJoin(ctx, n, r, endpoint, id, secret)
		}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, tpmPatience)
	defer cancel()
	device, err := storagev1.NewAttestationClient(d.storaged).Describe(ctx, &storagev1.DescribeRequest{})
	if err != nil {
		return nil, errs.New(errs.Of(err), "this node cannot join by its TPM: %s", errs.Text(err))
	}
	return func(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, endpoint string) (*keyring, []byte, error) {
		return d.askByTPM(ctx, n, r, endpoint, device, cas)
	}, nil
}

// askByTPM shows a control plane which machine this is, and believes the answer if it is under the signature of the authority that the operator has named.
func (d *Daemon) askByTPM(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, endpoint string, device *storagev1.DescribeResponse, cas []string) (*keyring, []byte, error) {
	c := &trustv1.AttestChallengeResponse{}
	err := d.call(ctx, trustv1.Join_Challenge_FullMethodName, endpoint, "", attest.Label, func([]byte) (proto.Message, error) {
		return &trustv1.AttestChallengeRequest{
			Name: r.GetName(), EndorsementKey: device.GetEndorsementKey(), EndorsementCertificate: device.GetEndorsementCertificate(), AttestationKey: device.GetAttestationKey(),
		}, nil
	}, c)
	if err != nil {
		return nil, nil, err
	}
	var binding []byte
	out := &trustv1.JoinAttestedResponse{}
	err = d.callFor(ctx, farPatience+tpmPatience, trustv1.Join_JoinAttested_FullMethodName, endpoint, "", attest.Label, func(b []byte) (proto.Message, error) {
		binding = b
		return d.proveByTPM(ctx, n, r, c, b)
	}, out)
	if err != nil {
		return nil, nil, err
	}
	resp, err := checkWord(out, cas, binding)
	if err != nil {
		return nil, nil, errs.New(errs.Denied, "%s: %w. Nothing was changed", endpoint, err)
	}
	k, err := n.accept(r, c.GetId(), resp, d.cfg.Now())
	if err != nil {
		return nil, nil, errs.New(errs.Denied, "%s: %w", endpoint, err)
	}
	return k, resp.GetCertificate(), nil
}

// proveByTPM has the TPM answer a challenge, for one connection.
func (d *Daemon) proveByTPM(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, c *trustv1.AttestChallengeResponse, binding []byte) (proto.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, tpmPatience)
	defer cancel()
	seal := n.seal.PublicKey().Bytes()
	p, err := storagev1.NewAttestationClient(d.storaged).Prove(ctx, &storagev1.ProveRequest{
		Credential: c.GetCredential(), EncryptedSecret: c.GetEncryptedSecret(), Qualifier: attest.Qualifier(c.GetNonce(), binding, r.GetName(), n.csr, seal),
	})
	if err != nil {
		return nil, errs.New(errs.Unavailable, "this node's TPM: %s", errs.Text(err))
	}
	return &trustv1.JoinAttestedRequest{
		Join: &trustv1.JoinRequest{TokenId: c.GetId(), Name: r.GetName(), Csr: n.csr, SealKey: seal}, Ticket: c.GetTicket(),
		Secret: p.GetSecret(), Quote: p.GetQuote(), Signature: p.GetSignature(), Pcrs: p.GetPcrs(),
		Image: &trustv1.AttestImage{Key: p.GetImageKey(), Policy: p.GetImagePolicy(), Signature: p.GetImageSignature(), Epoch: p.GetImageEpoch()},
	}, nil
}

// checkWord returns a cluster's answer, if an authority with one of the digests has signed it for this connection.
func checkWord(out *trustv1.JoinAttestedResponse, cas []string, binding []byte) (*trustv1.JoinResponse, error) {
	resp := &trustv1.JoinResponse{}
	if err := proto.Unmarshal(out.GetAnswer(), resp); err != nil {
		return nil, errs.New(errs.Denied, "its answer makes no sense: %w", err)
	}
	if got := sha256.Sum256(resp.GetOsCa()); !slices.Contains(cas, hex.EncodeToString(got[:])) {
		return nil, errs.New(errs.Denied, "its authority's certificate has the SHA-256 %x, not %s: it is of another cluster, or somebody is in between, or the cluster has a new authority", got, strings.Join(cas, " or "))
	}
	cert, err := x509.ParseCertificate(resp.GetOsCa())
	if err != nil {
		return nil, err
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(key, attest.Word(binding, out.GetAnswer()), out.GetSignature()) {
		return nil, errs.New(errs.Denied, "its answer is not signed by its authority: somebody is in between")
	}
	return resp, nil
}
