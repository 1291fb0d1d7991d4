package vault

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// A machine proves that it was started with an image that a key has signed, until its volumes are open; one with an image of nobody's proves which TPM it has, and no more.
func TestAttest(t *testing.T) {
	b := newBench(t, true)
	policy := attest.Policy{ImageKey: pcrpolicy.Fingerprint(&signer.PublicKey).String()}
	d, err := b.Describe()
	b.must(err)
	ak, err := attest.ParseAK(d.AK)
	b.must(err)
	prove := func() (attest.Quote, attest.Image) {
		t.Helper()
		secret, c, err := attest.Challenge(rand.Reader, d.EK, ak)
		b.must(err)
		want := attest.Qualifier(make([]byte, 32), make([]byte, 32), "n2", nil, nil)
		got, q, image, err := b.Prove(c, want)
		b.must(err)
		b.must(ak.Check(q, want))
		if !bytes.Equal(got, secret) {
			t.Error("another secret")
		}
		return q, image
	}
	q, image := prove()
	b.must(policy.Check(q.Values, image))
	value := attest.Policy{PCR11: q.Values[1].String()}
	b.must(b.Cap())
	q, image = prove()
	if err := policy.Check(q.Values, image); err == nil || !strings.Contains(err.Error(), "restart it before it joins") {
		t.Errorf("with its volumes open: %v", err)
	}
	if err := value.Check(q.Values, image); err == nil {
		t.Error("PCR 11 says that the volumes are open, and is taken for that of a machine that has just started")
	}
	b.must(os.Remove(filepath.Join(b.dir, "boot", signatureFile)))
	b.restart()
	if q, image = prove(); policy.Check(q.Values, image) == nil || len(image.Key) != 0 {
		t.Error("an image without a signature passes for one that is signed")
	}

	none := newBench(t, false)
	if _, err := none.Describe(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a TPM: %v", err)
	}
	if _, _, _, err := none.Prove(attest.Credential{}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a TPM: %v", err)
	}
}
