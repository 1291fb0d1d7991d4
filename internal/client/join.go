package client

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
)

// Joining is what a node that nobody owns is told so that it joins a cluster.
type Joining struct {
	// Code is what the node's console shows, or the key it was started with.
	Code string
	// Token is from trust.v1.Membership/MakeJoinToken; or an attest.Invitation, for a node that joins by its TPM.
	Token string
	// Endpoints are those of control planes, as the node reaches them; at least one.
	Endpoints []string
	// Name is what the node is called in the cluster; it must be Machine.hostname of its configuration.
	Name string
}

// Join makes the node at address a member of a cluster, and returns the cluster's authority for the Bulkhead API (PEM) and the node's role. The token is sealed for the node
// that knows the code, which proves in its answer that it does: on a wrong proof nothing of the answer is used. Errors have the kinds of
// trust.v1.Claim: Unauthenticated (wrong code, or the cluster refused the token), FailedPrecondition (somebody owns the node).
func Join(ctx context.Context, address string, j Joining) (ca []byte, role string, err error) {
	if address, err = Address(address); err != nil {
		return nil, "", err
	}
	code, err := claim.Normalize(j.Code)
	if err != nil {
		return nil, "", err
	}
	req := &trustv1.JoinClusterRequest{Name: j.Name}
	for _, e := range j.Endpoints {
		full, err := Address(e)
		if err != nil {
			return nil, "", err
		}
		req.Endpoints = append(req.Endpoints, full)
	}
	conn, binding, err := dialUnknown(ctx, address, claim.Binding, nil)
	if err != nil {
		return nil, "", fmt.Errorf("join %s: %w", address, err)
	}
	defer conn.Close()
	if req.SealedToken, err = claim.SealToken(code, binding, req.Name, req.Endpoints, j.Token, rand.Reader); err != nil {
		return nil, "", err
	}
	req.Proof = claim.JoinProof(code, binding, req.Name, req.SealedToken, req.Endpoints)
	resp, err := trustv1.NewClaimClient(conn).JoinCluster(ctx, req)
	if err != nil {
		return nil, "", fmt.Errorf("join %s: %w", address, err)
	}
	if !claim.Equal(resp.GetProof(), claim.JoinedProof(code, binding, resp.GetCa(), resp.GetRole())) {
		return nil, "", fmt.Errorf("join %s: the answer is not from a node that knows the code: somebody may be in between; the node may have joined nothing", address)
	}
	authority, err := x509.ParseCertificate(resp.GetCa())
	if err != nil {
		return nil, "", fmt.Errorf("join %s: the authority in the answer: %w", address, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Raw}), resp.GetRole(), nil
}
