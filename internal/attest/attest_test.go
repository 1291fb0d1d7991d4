package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
)

var (
	nonce, binding = bytes.Repeat([]byte{1}, NonceSize), bytes.Repeat([]byte{2}, 32)
	csr, sealKey   = []byte("csr"), bytes.Repeat([]byte{3}, 32)
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func describe(t testing.TB, m *testtpm.TPM) (Device, AK) {
	t.Helper()
	d, err := Describe(m)
	must(t, err)
	ak, err := ParseAK(d.AK)
	must(t, err)
	return d, ak
}

// A TPM proves that the attestation key is its own, and its quote is believed for what it is over, and nothing else.
func TestProve(t *testing.T) {
	m, other := testtpm.Start(t), testtpm.Start(t)
	d, ak := describe(t, m)
	if again, _ := describe(t, m); Fingerprint(again.EK) != Fingerprint(d.EK) || !bytes.Equal(again.AK, d.AK) {
		t.Error("the same TPM describes itself as another one")
	}
	strange, strangeAK := describe(t, other)
	if bytes.Equal(strange.EK, d.EK) || bytes.Equal(strange.AK, d.AK) {
		t.Fatal("two TPMs have one key")
	}
	want := Qualifier(nonce, binding, "n2", csr, sealKey)
	secret, c, err := Challenge(rand.Reader, d.EK, ak)
	must(t, err)
	got, q, err := Prove(m, c, want)
	must(t, err)
	if !bytes.Equal(got, secret) || len(secret) != SecretSize {
		t.Error("the TPM decrypts another secret")
	}
	must(t, ak.Check(q, want))
	m.Tool("tpm2_pcrextend", "7:sha256="+strings.Repeat("ab", 32))
	_, later, err := Prove(m, c, want)
	must(t, err)

	for name, c := range map[string]struct {
		ek  []byte
		ak  AK
		at  *testtpm.TPM
		err string
	}{
		"another TPM":               {d.EK, ak, other, "another TPM or another key"},
		"another TPM's attestation": {d.EK, strangeAK, m, "another TPM or another key"},
		"another's endorsement key": {strange.EK, ak, m, "another TPM or another key"},
	} {
		_, cred, err := Challenge(rand.Reader, c.ek, c.ak)
		must(t, err)
		if _, _, err := Prove(c.at, cred, want); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	flipped := q
	flipped.Signature = bytes.Clone(q.Signature)
	flipped.Signature[len(flipped.Signature)-1] ^= 1
	mixed := q
	mixed.Values = later.Values
	for name, c := range map[string]struct {
		ak   AK
		q    Quote
		want []byte
		err  string
	}{
		"another nonce":        {ak, q, Qualifier(binding, binding, "n2", csr, sealKey), "an old quote sent again"},
		"another connection":   {ak, q, Qualifier(nonce, nonce, "n2", csr, sealKey), "an old quote sent again"},
		"another name":         {ak, q, Qualifier(nonce, binding, "n3", csr, sealKey), "an old quote sent again"},
		"another request":      {ak, q, Qualifier(nonce, binding, "n2", []byte("CSR"), sealKey), "an old quote sent again"},
		"another seal key":     {ak, q, Qualifier(nonce, binding, "n2", csr, nonce), "an old quote sent again"},
		"another key":          {strangeAK, q, want, "another key than the attestation key"},
		"a broken signature":   {ak, flipped, want, "another key than the attestation key"},
		"values of afterwards": {ak, mixed, want, "not those that the TPM has quoted"},
		"nothing":              {ak, Quote{}, want, "cannot be read"},
		"too long":             {ak, Quote{Attest: make([]byte, MaxQuote+1)}, want, "too long"},
	} {
		if err := c.ak.Check(c.q, c.want); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A key that could sign what merely looks like a quote is none.
func TestParseAK(t *testing.T) {
	m := testtpm.Start(t)
	d, _ := describe(t, m)
	for name, change := range map[string]func(*tpm2.TPMTPublic){
		"not restricted":   func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false },
		"not of this TPM":  func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false },
		"born elsewhere":   func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false },
		"to decrypt with":  func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true },
		"another name alg": func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA1 },
		"on no curve": func(p *tpm2.TPMTPublic) {
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte{1}}, Y: tpm2.TPM2BECCParameter{Buffer: []byte{1}}})
		},
	} {
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](d.AK)
		must(t, err)
		change(p)
		if _, err := ParseAK(tpm2.Marshal(*p)); err == nil || !strings.Contains(err.Error(), "is not made as Bulkhead makes it") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, raw := range [][]byte{nil, {0}, append(bytes.Clone(d.AK), 0), make([]byte, MaxKey+1)} {
		if _, err := ParseAK(raw); err == nil {
			t.Errorf("%d bytes are taken for a key", len(raw))
		}
	}
	_, ak := describe(t, m)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	spki, err := x509.MarshalPKIXPublicKey(&p384.PublicKey)
	must(t, err)
	for _, ek := range [][]byte{nil, []byte("x"), spki, append(bytes.Clone(d.EK), 0)} {
		if _, _, err := Challenge(rand.Reader, ek, ak); err == nil || !strings.Contains(err.Error(), "ECC P-256") {
			t.Errorf("%d bytes are taken for an endorsement key: %v", len(ek), err)
		}
	}
}

func TestPolicy(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	pub, err := pcrpolicy.EncodeKey(&key.PublicKey)
	must(t, err)
	v := Values{{7}, {11}}
	data, err := pcrpolicy.Sign(key, pcrpolicy.Policy{PCR11: v[1], Epoch: 3})
	must(t, err)
	s, err := pcrpolicy.ParseSignature(data)
	must(t, err)
	image := Image{Key: pub, Policy: s.Policy, Signature: s.Signature, Epoch: 3}
	signer := pcrpolicy.Fingerprint(&key.PublicKey).String()
	old := image
	old.Epoch = 4
	forged := image
	forged.Policy[0] ^= 1
	added := v
	added[2][0] = 1
	capped := v
	capped[1] = pcrpolicy.Extend(v[1], pcrpolicy.Digest{1})
	other := pcrpolicy.Digest{9}.String()
	for name, c := range map[string]struct {
		p   Policy
		v   Values
		i   Image
		err string
	}{
		"nothing wanted":         {v: added},
		"PCR 7":                  {p: Policy{PCR7: v[0].String()}, v: v},
		"PCR 11":                 {p: Policy{PCR11: v[1].String()}, v: v},
		"PCR 11, capped":         {p: Policy{PCR11: v[1].String()}, v: capped, err: "restart it before it joins"},
		"an image that is":       {p: Policy{ImageKey: signer}, v: v, i: image},
		"all":                    {p: Policy{PCR7: v[0].String(), PCR11: v[1].String(), ImageKey: signer}, v: v, i: image},
		"another PCR 7":          {p: Policy{PCR7: other}, v: v, err: "PCR 7 (Secure Boot) is " + v[0].String() + "; allowed is " + other},
		"another PCR 11":         {p: Policy{PCR11: other}, v: v, err: "PCR 11 (the image) is"},
		"words added":            {p: Policy{PCR11: v[1].String()}, v: added, err: "PCR 12 is"},
		"words added to signed":  {p: Policy{ImageKey: signer}, v: added, i: image, err: "PCR 12 is"},
		"no image":               {p: Policy{ImageKey: signer}, v: v, err: "not started with a signed image"},
		"another signer":         {p: Policy{ImageKey: other}, v: v, i: image, err: "allowed is " + other},
		"another epoch":          {p: Policy{ImageKey: signer}, v: v, i: old, err: "not that of the image whose signature was sent"},
		"another image's words":  {p: Policy{ImageKey: signer}, v: Values{{7}, {12}}, i: image, err: "not that of the image whose signature was sent"},
		"a forged signature":     {p: Policy{ImageKey: signer}, v: v, i: forged, err: "the image's signature"},
		"after volumes are open": {p: Policy{ImageKey: signer}, v: capped, i: image, err: "not that of the image whose signature was sent"},
	} {
		err := c.p.Check(c.v, c.i)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// maker is an authority that gives TPMs their certificates.
type maker struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newMaker(t testing.TB, name string) maker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return maker{cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

func (k maker) certify(t testing.TB, ek []byte) []byte {
	t.Helper()
	public, err := x509.ParsePKIXPublicKey(ek)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), KeyUsage: x509.KeyUsageKeyAgreement}, k.cert, public, k.key)
	must(t, err)
	return der
}

// A TPM shows its maker's certificate from where makers put it.
func TestVouched(t *testing.T) {
	m := testtpm.Start(t)
	d, _ := describe(t, m)
	if d.Certificate != nil {
		t.Fatal("a new TPM of this kind has a certificate")
	}
	good, bad := newMaker(t, "good"), newMaker(t, "bad")
	der := good.certify(t, d.EK)
	m.File("cert", append(bytes.Clone(der), 0xff, 0xff)) // filled up
	m.Tool("tpm2_nvdefine", "0x01c0000a", "-C", "o", "-s", big.NewInt(int64(len(der)+2)).String(), "-a", "ownerread|ownerwrite|authread|no_da")
	m.Tool("tpm2_nvwrite", "0x01c0000a", "-C", "o", "-i", "cert")
	d, _ = describe(t, m)
	if !bytes.Equal(d.Certificate, der) {
		t.Fatalf("the TPM's certificate is %d bytes, not the %d that were written", len(d.Certificate), len(der))
	}
	other, _ := describe(t, testtpm.Start(t))
	forged := bytes.Clone(der)
	forged[len(forged)-1] ^= 1
	for name, c := range map[string]struct {
		ca       string
		cert, ek []byte
		err      string
	}{
		"right":             {good.pem, der, d.EK, ""},
		"one of two":        {bad.pem + good.pem, der, d.EK, ""},
		"another maker":     {bad.pem, der, d.EK, "none of the authorities"},
		"another's":         {good.pem, der, other.EK, "another endorsement key"},
		"no certificate":    {good.pem, nil, d.EK, "no certificate"},
		"forged":            {good.pem, forged, d.EK, "none of the authorities"},
		"nonsense":          {good.pem, []byte("x"), d.EK, "cannot be read"},
		"too long":          {good.pem, make([]byte, MaxCertificate+1), d.EK, "allowed are"},
		"no authority":      {"", der, d.EK, "give 1 to 16"},
		"and something":     {good.pem + "x", der, d.EK, "nothing else"},
		"no authority's":    {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), der, d.EK, "is no authority's"},
		"broken authority":  {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})), der, d.EK, "certificate 1"},
		"too many to think": {strings.Repeat(good.pem, 17), der, d.EK, "give 1 to 16"},
	} {
		err := Vouched(c.ca, c.cert, c.ek)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTicket(t *testing.T) {
	key, now := bytes.Repeat([]byte{5}, 32), time.Unix(1_900_000_000, 0)
	in := Ticket{Record: "0123456789", Name: "n2", EK: []byte{1}, AK: []byte{2}, Nonce: nonce, Secret: binding, Expires: now.Add(TicketLife)}
	sealed, err := in.Seal(key, rand.Reader)
	must(t, err)
	if bytes.Contains(sealed, binding) {
		t.Error("the ticket shows its secret")
	}
	out, err := OpenTicket(key, sealed, now)
	if err != nil || out.Record != in.Record || !bytes.Equal(out.Secret, in.Secret) || !out.Expires.Equal(in.Expires) {
		t.Errorf("%+v, %v", out, err)
	}
	if _, err := OpenTicket(key, sealed, now.Add(TicketLife+time.Second)); err == nil || !strings.Contains(err.Error(), "ask for another one") {
		t.Errorf("an old one: %v", err)
	}
	changed := bytes.Clone(sealed)
	changed[20] ^= 1
	for _, bad := range [][]byte{nil, sealed[:8], changed, make([]byte, maxTicket+1)} {
		if _, err := OpenTicket(key, bad, now); err == nil {
			t.Errorf("%d bytes are taken for a ticket", len(bad))
		}
	}
	if _, err := OpenTicket(binding, sealed, now); err == nil {
		t.Error("another cluster's ticket is taken")
	}
}

func TestInvitation(t *testing.T) {
	d := strings.Repeat("ab", 32)
	e := strings.Repeat("cd", 32)
	for _, want := range [][]string{{d}, {d, e}} {
		if got, ok := ParseInvitation(Invitation(want...)); !ok || !slices.Equal(got, want) {
			t.Errorf("%q, %v", got, ok)
		}
	}
	for _, no := range []string{"", "tpm:", "tpm:12", "tpm:" + d + ",", Invitation(slices.Repeat([]string{d}, 9)...), d, "0123456789.0000-0000-0000-0000-0000-0000-0000-0000"} {
		if _, ok := ParseInvitation(no); ok {
			t.Errorf("%q is taken for an invitation", no)
		}
	}
	for _, text := range []string{d, "sha256:" + d, strings.ToUpper(d), strings.TrimSuffix(strings.Repeat("AB:", 32), ":"), " " + d + "\n"} {
		if got, err := ParseDigest(text); err != nil || got != d {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}
