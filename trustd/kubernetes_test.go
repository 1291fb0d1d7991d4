package trustd

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	externaljwtv1 "k8s.io/externaljwt/apis/v1"
	kmsv2 "k8s.io/kms/apis/v2"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func bootstrapped(t *testing.T) (*machine, *Daemon, *grpcAs) {
	m := newMachine(t)
	m.mountState()
	d, as := m.serve()
	waitSettled(t, d)
	m.claim(d)
	configure(t, d, 1, config.ControlPlane)
	_, err := d.bootstrap()
	m.must(err)
	return m, d, &grpcAs{as}
}

func claims(sub string, exp any) string {
	raw, err := json.Marshal(map[string]any{"iss": "https://kubernetes.default.svc", "sub": sub, "exp": exp, "aud": []string{"x"}, "kubernetes.io": map[string]any{"namespace": "default"}})
	if err != nil {
		panic(err)
	}
	return base64.RawURLEncoding.EncodeToString(raw)
}

// The checks on the answers are those of kube-apiserver (pkg/serviceaccount/externaljwt/plugin).
func TestServiceAccountTokens(t *testing.T) {
	m, _, as := bootstrapped(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c := externaljwtv1.NewExternalJWTSignerClient(as.conn(uid.KubeAPIServer))
	keys, err := c.FetchKeys(ctx, &externaljwtv1.FetchKeysRequest{})
	m.must(err)
	if len(keys.GetKeys()) != 1 || keys.GetRefreshHintSeconds() <= 0 || keys.GetDataTimestamp().CheckValid() != nil {
		t.Fatalf("keys: %v", keys)
	}
	public, err := x509.ParsePKIXPublicKey(keys.GetKeys()[0].GetKey())
	m.must(err)
	payload := claims("system:serviceaccount:default:web", time.Now().Add(time.Hour).Unix())
	resp, err := c.Sign(ctx, &externaljwtv1.SignJWTRequest{Claims: payload})
	m.must(err)
	raw, err := base64.RawURLEncoding.DecodeString(resp.GetHeader())
	m.must(err)
	var header struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	m.must(dec.Decode(&header))
	if header.Algorithm != "ES256" || header.Type != "JWT" || header.KeyID != keys.GetKeys()[0].GetKeyId() {
		t.Errorf("header %+v", header)
	}
	if _, err := jwt.Parse(resp.GetHeader()+"."+payload+"."+resp.GetSignature(), func(*jwt.Token) (any, error) { return public, nil }, jwt.WithValidMethods([]string{"ES256"})); err != nil {
		t.Error(err)
	}
	md, err := c.Metadata(ctx, &externaljwtv1.MetadataRequest{})
	m.must(err)
	if md.GetMaxTokenExpirationSeconds() < 600 {
		t.Errorf("kube-apiserver refuses a longest life of %d s", md.GetMaxTokenExpirationSeconds())
	}
	for name, p := range map[string]string{
		"a user":      claims("system:admin", time.Now().Add(time.Hour).Unix()),
		"for ever":    claims("system:serviceaccount:a:b", time.Now().Add(48*time.Hour).Unix()),
		"no end":      claims("system:serviceaccount:a:b", nil),
		"no base64":   "!!",
		"padded":      payload + "=",
		"two tokens":  payload + "." + payload,
		"no JSON":     base64.RawURLEncoding.EncodeToString([]byte("x")),
		"much":        base64.RawURLEncoding.EncodeToString(make([]byte, maxClaims)),
		"empty":       "",
		"end in text": claims("system:serviceaccount:a:b", "tomorrow"),
	} {
		if _, err := c.Sign(ctx, &externaljwtv1.SignJWTRequest{Claims: p}); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	for _, id := range []uid.ID{uid.Kubeletd, uid.Apid, uid.KubeScheduler} {
		if _, err := externaljwtv1.NewExternalJWTSignerClient(as.conn(id)).Sign(ctx, &externaljwtv1.SignJWTRequest{Claims: payload}, grpc.WaitForReady(false)); err == nil {
			t.Errorf("%s may sign", id.Name())
		}
	}
}

func TestKMS(t *testing.T) {
	m, _, as := bootstrapped(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c := kmsv2.NewKeyManagementServiceClient(as.conn(uid.KubeAPIServer))
	st, err := c.Status(ctx, &kmsv2.StatusRequest{})
	m.must(err)
	if st.GetVersion() != "v2" || st.GetHealthz() != "ok" || st.GetKeyId() == "" {
		t.Errorf("status %v", st)
	}
	plain := make([]byte, 32)
	if _, err := rand.Read(plain); err != nil {
		t.Fatal(err)
	}
	enc, err := c.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: plain, Uid: "1"})
	m.must(err)
	if enc.GetKeyId() != st.GetKeyId() || len(enc.GetCiphertext()) > 1024 || bytes.Contains(enc.GetCiphertext(), plain) {
		t.Errorf("encrypted %d bytes with %q", len(enc.GetCiphertext()), enc.GetKeyId())
	}
	dec, err := c.Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId(), Uid: "2"})
	m.must(err)
	if !bytes.Equal(dec.GetPlaintext(), plain) {
		t.Error("decrypted something else")
	}
	for i := range enc.GetCiphertext() {
		bad := bytes.Clone(enc.GetCiphertext())
		bad[i] ^= 1
		if _, err := c.Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: bad, KeyId: enc.GetKeyId()}); !errs.Is(err, errs.Invalid) {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
	}
	for n, text := range [][]byte{nil, {1}, enc.GetCiphertext()[:20], make([]byte, 4096)} {
		if _, err := c.Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: text, KeyId: enc.GetKeyId()}); !errs.Is(err, errs.Invalid) {
			t.Errorf("ciphertext %d: %v", n, err)
		}
	}
	if _, err := c.Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: "other"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("foreign key: %v", err)
	}
	for _, n := range []int{0, maxPlain + 1} {
		if _, err := c.Encrypt(ctx, &kmsv2.EncryptRequest{Plaintext: make([]byte, n)}); !errs.Is(err, errs.Invalid) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, err := kmsv2.NewKeyManagementServiceClient(as.conn(uid.Kubeletd)).Decrypt(ctx, &kmsv2.DecryptRequest{Ciphertext: enc.GetCiphertext(), KeyId: enc.GetKeyId()}, grpc.WaitForReady(false)); err == nil {
		t.Error("kubeletd may decrypt")
	}
}

func FuzzKeyFiles(f *testing.F) {
	_, identity, err := newIdentity(rand.Reader, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	c, clusterFile, err := newCluster(rand.Reader, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(identity)
	f.Add(clusterFile)
	f.Add([]byte("{}"))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		k := &keyring{}
		if err := k.parseIdentity(data); err == nil && (k.os == nil || len(k.tokens) == 0) {
			t.Error("read, but something is missing")
		}
		if got, err := parseCluster(data); err == nil && (got.etcd == nil || got.kubernetes == nil || got.frontProxy == nil || len(got.accounts) == 0 || len(got.secrets) == 0) {
			t.Error("read, but something is missing")
		}
	})
	if got, err := parseCluster(clusterFile); err != nil || got.secrets[0].id != c.secrets[0].id || got.accounts[0].id != c.accounts[0].id {
		f.Errorf("what was written is not what is read: %v", err)
	}
	if s := fmt.Sprintf("%v %+v %s", c.secrets, *c, c.accounts[0]); s != "[[secret]] [secret] [secret]" {
		f.Errorf("secrets print as %s", s)
	}
}
