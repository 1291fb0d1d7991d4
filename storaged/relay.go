package storaged

import (
	"context"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// relay reaches key services through updated, which has a network. It learns a part of a key that opens nothing without the disk.
type relay struct{ client keysv1.RelayClient }

func keyServerOf(p vault.Place) *keysv1.Server {
	return &keysv1.Server{Address: p.Address, Pin: p.Pin, Certificate: p.Certificate, Key: p.Key}
}

func (r relay) Seal(ctx context.Context, p vault.Place, key secret.Bytes) ([]byte, error) {
	a, err := r.client.Seal(ctx, &keysv1.RelaySealRequest{Server: keyServerOf(p), Plaintext: key.Expose()})
	return a.GetSealed(), err
}

func (r relay) Unseal(ctx context.Context, p vault.Place, sealed []byte) (secret.Bytes, error) {
	a, err := r.client.Unseal(ctx, &keysv1.RelayUnsealRequest{Server: keyServerOf(p), Sealed: sealed})
	return secret.From(a.GetPlaintext()), err
}
