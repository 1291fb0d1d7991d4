package attest

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzAK reads attestation keys of machines that want to be let in: one that is taken has one form only, and is a point of the curve.
func FuzzAK(f *testing.F) {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	point := key.PublicKey().Bytes()
	good := akTemplate
	good.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	f.Add(tpm2.Marshal(good))
	f.Add([]byte{})
	testfuzz.Run(f, func(t *testing.T, raw []byte) {
		ak, err := ParseAK(raw)
		if err != nil {
			return
		}
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](raw)
		if err != nil || !bytes.Equal(tpm2.Marshal(*p), raw) || ak.key == nil || len(ak.name) != 34 {
			t.Errorf("%x is taken for a key: %v", raw, err)
		}
	})
}

// FuzzQuote checks what nobody signed, and reads it as if somebody had.
func FuzzQuote(f *testing.F) {
	a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: []byte("a nonce")},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{PCRSelect: selection(), PCRDigest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)}})}
	f.Add(tpm2.Marshal(a), []byte("signature"))
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	point := key.PublicKey().Bytes()
	public, err := onCurve(&tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	if err != nil {
		f.Fatal(err)
	}
	testfuzz.Run(f, func(t *testing.T, attest, signature []byte) {
		if got, err := parse(attest); err == nil && (len(got.extra) > len(attest) || len(got.digest) > len(attest)) {
			t.Errorf("%x is read as %+v", attest, got)
		}
		if (AK{key: public}).Check(Quote{Attest: attest, Signature: signature}, []byte("a nonce")) == nil {
			t.Errorf("%x is taken for signed, by %x", attest, signature)
		}
	})
}

// FuzzCertificate reads certificates of TPMs: only what the maker has signed is the maker's word.
func FuzzCertificate(f *testing.F) {
	k := newMaker(f, "maker")
	ek, err := x509.MarshalPKIXPublicKey(&k.key.PublicKey)
	must(f, err)
	good, err := x509.ParseCertificate(k.certify(f, ek))
	must(f, err)
	f.Add(k.pem, good.Raw)
	f.Add("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", []byte{})
	testfuzz.Run(f, func(t *testing.T, authorities string, certificate []byte) {
		err := Vouched(authorities, certificate, ek)
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Errorf("the refusal has %d bytes", len(err.Error()))
			}
			return
		}
		if c, err := x509.ParseCertificate(certificate); err != nil || !bytes.Equal(c.RawTBSCertificate, good.RawTBSCertificate) {
			t.Errorf("%x passes for the maker's: %v", certificate, err)
		}
	})
}
