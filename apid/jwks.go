package apid

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// maxKeys bounds the keys of an issuer.
const maxKeys = 64

// keySet is the keys of an issuer (RFC 7517). It is never changed once it is made; nil is empty.
type keySet struct{ keys []webKey }

// webKey is one that verifies signatures.
type webKey struct {
	id, alg string // alg "": any that fits
	public  any    // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
}

// find returns the key of an id for an algorithm; nil if there is none. A token without an id is signed with the only key there is.
func (s *keySet) find(id, alg string) any {
	if s == nil {
		return nil
	}
	for _, k := range s.keys {
		if (k.id == id || id == "" && len(s.keys) == 1) && (k.alg == "" || k.alg == alg) && k.fits(alg) {
			return k.public
		}
	}
	return nil
}

// fits reports whether an algorithm (RFC 7518 section 3.1) uses this kind of key: a key is never used in another way than its own.
func (k webKey) fits(alg string) bool {
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(alg, "RS") || strings.HasPrefix(alg, "PS")
	case *ecdsa.PublicKey:
		return alg == map[elliptic.Curve]string{elliptic.P256(): "ES256", elliptic.P384(): "ES384", elliptic.P521(): "ES512"}[public.Curve]
	case ed25519.PublicKey:
		return alg == "EdDSA"
	}
	return false
}

// parseKeys reads a JWK set. Keys that are for encryption, of other kinds, or too weak, are left out; one must be left.
func parseKeys(raw []byte) (*keySet, error) {
	var doc struct {
		Keys []struct {
			Kty, Use, Kid, Alg, Crv, N, E, X, Y string
		} `json:"keys"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("its keys are not JSON: %w", err)
	}
	if len(doc.Keys) > maxKeys {
		return nil, fmt.Errorf("it has %d keys; allowed are %d", len(doc.Keys), maxKeys)
	}
	set, why := &keySet{}, errors.New("there are none")
	for _, k := range doc.Keys {
		if k.Use != "" && k.Use != "sig" {
			continue
		}
		var public any
		var err error
		switch k.Kty {
		case "RSA":
			public, err = rsaKey(k.N, k.E)
		case "EC":
			public, err = ecKey(k.Crv, k.X, k.Y)
		case "OKP":
			public, err = edKey(k.Crv, k.X)
		default:
			err = fmt.Errorf("kind %.16q is not for signatures", k.Kty)
		}
		if err != nil {
			why = fmt.Errorf("key %.64q: %w", k.Kid, err)
			continue
		}
		set.keys = append(set.keys, webKey{id: k.Kid, alg: k.Alg, public: public})
	}
	if len(set.keys) == 0 {
		return nil, fmt.Errorf("it has no key for signatures: %w", why)
	}
	return set, nil
}

// rsaKey is that of RFC 7518 section 6.3.1, of 2048 to 8192 bits.
func rsaKey(n, e string) (*rsa.PublicKey, error) {
	modulus, err1 := base64.RawURLEncoding.DecodeString(n)
	exponent, err2 := base64.RawURLEncoding.DecodeString(e)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	k := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus)}
	if b := k.N.BitLen(); b < 2048 || b > 8192 {
		return nil, fmt.Errorf("RSA of %d bits; allowed are 2048 to 8192", b)
	}
	x := new(big.Int).SetBytes(exponent)
	if !x.IsInt64() || x.Int64() < 3 || x.Int64() >= 1<<31 || x.Bit(0) == 0 {
		return nil, errors.New("RSA with a public exponent that no good key has")
	}
	k.E = int(x.Int64())
	return k, nil
}

// ecKey is that of RFC 7518 section 6.2.1. The point must be on the curve.
func ecKey(crv, x, y string) (*ecdsa.PublicKey, error) {
	curve := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[crv]
	if curve == nil {
		return nil, fmt.Errorf("curve %.16q; allowed are P-256, P-384, P-521", crv)
	}
	size := (curve.Params().BitSize + 7) / 8
	point := []byte{4} // uncompressed
	for _, text := range []string{x, y} {
		raw, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil || len(raw) != size {
			return nil, fmt.Errorf("a coordinate has not %d bytes", size)
		}
		point = append(point, raw...)
	}
	return ecdsa.ParseUncompressedPublicKey(curve, point)
}

// edKey is that of RFC 8037 section 2.
func edKey(crv, x string) (ed25519.PublicKey, error) {
	raw, err := base64.RawURLEncoding.DecodeString(x)
	if err != nil || crv != "Ed25519" || len(raw) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("curve %.16q with %d bytes; allowed is Ed25519 with %d", crv, len(raw), ed25519.PublicKeySize)
	}
	return ed25519.PublicKey(raw), nil
}
