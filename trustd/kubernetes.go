package trustd

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	externaljwtv1 "k8s.io/externaljwt/apis/v1"
	kmsv2 "k8s.io/kms/apis/v2"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Bounds of what kube-apiserver may ask for.
const (
	maxClaims = 64 << 10 // bytes of a token's payload, encoded
	// maxAccountToken is the longest life of a service-account token. The kubelet renews them long before; an hour's token that pods
	// ask for is stretched to this at most (kube-apiserver --service-account-extend-token-expiration).
	maxAccountToken = day
	// clockSlack is for a caller whose clock was read a moment before ours.
	clockSlack  = time.Minute
	keysRefresh = 5 * time.Minute
	// maxPlain keeps the ciphertext below the 1 kB that kube-apiserver stores; it sends seeds of 32 bytes.
	maxPlain   = 512
	sealFormat = 1 // first byte of a ciphertext
)

// jwtServer signs service-account tokens (k8s.io/externaljwt); kube-apiserver alone may call it.
type jwtServer struct {
	externaljwtv1.UnimplementedExternalJWTSignerServer
	d *Daemon
}

func (d *Daemon) cluster() (*cluster, error) {
	k, _ := d.keys.Get()
	if k.cluster == nil {
		return nil, errs.New(errs.Precondition, "the cluster's keys do not exist yet; bootstrap the node")
	}
	return k.cluster, nil
}

func (s jwtServer) Sign(_ context.Context, r *externaljwtv1.SignJWTRequest) (*externaljwtv1.SignJWTResponse, error) {
	c, err := s.d.cluster()
	if err != nil {
		return nil, err
	}
	if err := checkClaims(r.GetClaims(), s.d.cfg.Now()); err != nil {
		return nil, errs.New(errs.Invalid, "claims: %w", err)
	}
	header, err := json.Marshal(map[string]string{"alg": "ES256", "kid": c.accounts[0].id, "typ": "JWT"})
	if err != nil {
		return nil, err
	}
	text := base64.RawURLEncoding.EncodeToString(header)
	digest := sha256.Sum256([]byte(text + "." + r.GetClaims()))
	private, ok := c.accounts[0].private.(*ecdsa.PrivateKey)
	if !ok {
		panic("trustd: a service-account key is no ECDSA key") // parseCluster has checked it
	}
	x, y, err := ecdsa.Sign(s.d.cfg.Random, private, digest[:])
	if err != nil {
		return nil, err
	}
	raw := make([]byte, 64) // RFC 7518 section 3.4
	x.FillBytes(raw[:32])
	y.FillBytes(raw[32:])
	s.d.count.accountTokens.Add(1)
	return &externaljwtv1.SignJWTResponse{Header: text, Signature: base64.RawURLEncoding.EncodeToString(raw)}, nil
}

// checkClaims lets nothing be signed but a service account's token of limited life.
func checkClaims(encoded string, now time.Time) error {
	if len(encoded) > maxClaims {
		return fmt.Errorf("%d bytes; at most %d", len(encoded), maxClaims)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return err
	}
	var c struct {
		Subject string  `json:"sub"`
		Expires float64 `json:"exp"`
	}
	if err := json.Unmarshal(raw, &c); err != nil {
		return err
	}
	if !strings.HasPrefix(c.Subject, "system:serviceaccount:") {
		return fmt.Errorf("sub: %q is no service account", c.Subject)
	}
	if latest := now.Add(maxAccountToken + clockSlack); c.Expires <= 0 || c.Expires > float64(latest.Unix()) {
		return fmt.Errorf("exp: %.0f; allowed is until %d", c.Expires, latest.Unix())
	}
	return nil
}

func (s jwtServer) FetchKeys(context.Context, *externaljwtv1.FetchKeysRequest) (*externaljwtv1.FetchKeysResponse, error) {
	c, err := s.d.cluster()
	if err != nil {
		return nil, err
	}
	out := &externaljwtv1.FetchKeysResponse{DataTimestamp: timestamppb.New(s.d.cfg.Now()), RefreshHintSeconds: int64(keysRefresh / time.Second)}
	for _, k := range c.accounts {
		out.Keys = append(out.Keys, &externaljwtv1.Key{KeyId: k.id, Key: k.public})
	}
	return out, nil
}

func (s jwtServer) Metadata(context.Context, *externaljwtv1.MetadataRequest) (*externaljwtv1.MetadataResponse, error) {
	return &externaljwtv1.MetadataResponse{MaxTokenExpirationSeconds: int64(maxAccountToken / time.Second)}, nil
}

// kmsServer encrypts the keys that kube-apiserver encrypts secrets with (k8s.io/kms v2).
type kmsServer struct {
	kmsv2.UnimplementedKeyManagementServiceServer
	d *Daemon
}

func (s kmsServer) Status(context.Context, *kmsv2.StatusRequest) (*kmsv2.StatusResponse, error) {
	c, err := s.d.cluster()
	if err != nil {
		return nil, err
	}
	return &kmsv2.StatusResponse{Version: "v2", Healthz: "ok", KeyId: c.secrets[0].id}, nil
}

func (s kmsServer) Encrypt(_ context.Context, r *kmsv2.EncryptRequest) (*kmsv2.EncryptResponse, error) {
	c, err := s.d.cluster()
	if err != nil {
		return nil, err
	}
	if n := len(r.GetPlaintext()); n == 0 || n > maxPlain {
		return nil, errs.New(errs.Invalid, "plaintext: %d bytes; allowed are 1 to %d", n, maxPlain)
	}
	key := c.secrets[0]
	out, err := key.seal(r.GetPlaintext(), s.d.cfg.Random)
	if err != nil {
		return nil, err
	}
	s.d.count.seals.Add(1)
	return &kmsv2.EncryptResponse{Ciphertext: out, KeyId: key.id}, nil
}

func (s kmsServer) Decrypt(_ context.Context, r *kmsv2.DecryptRequest) (*kmsv2.DecryptResponse, error) {
	c, err := s.d.cluster()
	if err != nil {
		return nil, err
	}
	for _, key := range c.secrets {
		if key.id != r.GetKeyId() {
			continue
		}
		plain, err := key.open(r.GetCiphertext())
		if err != nil {
			return nil, errs.New(errs.Invalid, "ciphertext: %w", err)
		}
		s.d.count.unseals.Add(1)
		return &kmsv2.DecryptResponse{Plaintext: plain}, nil
	}
	return nil, errs.New(errs.NotFound, "key %.64q: trustd has no such key; is this etcd from another cluster?", r.GetKeyId())
}

// seal encrypts: format byte, nonce, AES-256-GCM. Nonces are random: a key serves a few times a day, far from 2^32.
func (k seal) seal(plain []byte, random io.Reader) ([]byte, error) {
	gcm, err := k.gcm()
	if err != nil {
		return nil, err
	}
	out := make([]byte, 1+gcm.NonceSize(), 1+gcm.NonceSize()+len(plain)+gcm.Overhead())
	out[0] = sealFormat
	if _, err := io.ReadFull(random, out[1:]); err != nil {
		return nil, err
	}
	return gcm.Seal(out, out[1:], plain, []byte(k.id)), nil
}

func (k seal) open(sealed []byte) ([]byte, error) {
	gcm, err := k.gcm()
	if err != nil {
		return nil, err
	}
	n := 1 + gcm.NonceSize()
	if len(sealed) < n+gcm.Overhead() || len(sealed) > n+gcm.Overhead()+maxPlain || sealed[0] != sealFormat {
		return nil, fmt.Errorf("%d bytes that were not encrypted here", len(sealed))
	}
	return gcm.Open(nil, sealed[1:n], sealed[n:], []byte(k.id))
}

func (k seal) gcm() (cipher.AEAD, error) {
	b, err := aes.NewCipher(k.aes)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}
