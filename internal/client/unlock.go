package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
)

// Unlock opens a node's locked volumes with a recovery key or a passphrase (kind: unlock.Recovery, unlock.Passphrase), and returns which. While
// STATE is locked the node knows nobody, and c may be the zero value; later it takes an administrator's certificate.
//
// The key is sent only to a node that has shown that it knows it. If it does not, the key is a wrong one, or somebody is in between: then the
// error says why the volumes do not open by themselves.
func Unlock(ctx context.Context, endpoint, kind, key string, c Credentials) ([]string, error) {
	address, err := Address(endpoint)
	if err != nil {
		return nil, err
	}
	raw, err := unlock.Normalize(kind, key)
	if err != nil {
		return nil, err
	}
	var own []tls.Certificate
	if len(c.Certificate) > 0 {
		pair, err := tls.X509KeyPair(c.Certificate, c.Key)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		own = append(own, pair)
	}
	conn, binding, err := dialUnknown(ctx, address, unlock.Binding, own)
	if err != nil {
		return nil, fmt.Errorf("unlock %s: %w", address, err)
	}
	defer conn.Close()
	node := storagev1.NewUnlockClient(conn)
	all, err := node.Challenge(ctx, &storagev1.ChallengeRequest{})
	if err != nil {
		return nil, fmt.Errorf("unlock %s: %w", address, err)
	}
	for _, ch := range all.GetChallenges() {
		if ch.GetKind() != kind {
			continue
		}
		verifier := unlock.Verifier(kind, raw, ch.GetSalt())
		if !unlock.Equal(ch.GetProof(), unlock.NodeProof(verifier, binding)) {
			continue
		}
		r, err := node.Unlock(ctx, &storagev1.UnlockRequest{Kind: kind, Salt: ch.GetSalt(), Key: key, Proof: unlock.CallerProof(verifier, binding)})
		if err != nil {
			return nil, fmt.Errorf("unlock %s: %w", address, err)
		}
		return r.GetVolumes(), nil
	}
	return nil, fmt.Errorf("unlock %s: the node does not know this key, so it was not sent: it is wrong, or somebody is in between\n  Why it is locked: %s",
		address, strings.Join(all.GetReasons(), "; "))
}
