package image

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/image/uki"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Keys are what an image is signed with, and what a firmware is told to trust. LoadKeys reads them from a folder; a program may as
// well fill in Signers whose keys are in a token or in a key service.
type Keys struct {
	Boot    uki.Signer    // db: the boot loader and the kernel image
	PCR     crypto.Signer // RSA: the PCR 11 policy, by which a TPM gives its secret to this image and its successors
	Release crypto.Signer // Ed25519: the manifest of an update

	Certificates map[string]*x509.Certificate // of PK, KEK and db
	Enrol        map[string][]byte            // PK.auth, KEK.auth, db.auth: what a firmware in setup mode takes
}

// secureBoot are Secure Boot's keys, in the order in which each is signed by the one before: PK signs itself and KEK, KEK signs db.
var secureBoot = []struct {
	name, by, common string
	namespace        gpt.GUID
}{
	{"PK", "PK", "Bulkhead platform key", uki.GlobalVariable},
	{"KEK", "PK", "Bulkhead key exchange key", uki.GlobalVariable},
	{"db", "KEK", "Bulkhead boot signing key", uki.ImageSecurity},
}

const keyBits = 2048 // of RSA: no firmware is sure to take more

// MakeKeys makes a folder with a new set of keys. One that is there is never replaced: nodes in the field trust it.
// PK.key and KEK.key sign nothing in an image and may be kept elsewhere.
func MakeKeys(dir string, now time.Time) (err error) {
	if _, err := os.Lstat(dir); err == nil {
		return fmt.Errorf("%s is there already and is not replaced: what trusts its keys would trust nothing any more", dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".new-") // mode 0700
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := writeSecureBoot(tmp, now); err != nil {
		return err
	}
	pcr, err := rsa.GenerateKey(rand.Reader, keyBits)
	if err != nil {
		return err
	}
	_, release, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	for name, key := range map[string]crypto.Signer{"pcr": pcr, "release": release} {
		public, err := publicPEM(key)
		if err == nil {
			err = errors.Join(writeKey(tmp, name, key), os.WriteFile(filepath.Join(tmp, name+".pub"), public, 0o644))
		}
		if err != nil {
			return err
		}
	}
	return os.Rename(tmp, dir)
}

func writeSecureBoot(dir string, now time.Time) error {
	signers := map[string]uki.Signer{}
	for _, k := range secureBoot {
		key, err := rsa.GenerateKey(rand.Reader, keyBits)
		if err != nil {
			return err
		}
		s, err := selfSigned(k.common, key, now)
		if err != nil {
			return err
		}
		signers[k.name] = s
		v := uki.Variable{Name: k.name, Namespace: k.namespace, Value: uki.Certificates(s.Certificate)}
		update, err := v.Update(signers[k.by], now)
		if err != nil {
			return err
		}
		err = errors.Join(writeKey(dir, k.name, key),
			os.WriteFile(filepath.Join(dir, k.name+".crt"), certificatePEM(s.Certificate), 0o644),
			os.WriteFile(filepath.Join(dir, k.name+".auth"), update, 0o644))
		if err != nil {
			return err
		}
	}
	return nil
}

// selfSigned makes the certificate by which a firmware knows a key. Its time means nothing there: a firmware's clock cannot be trusted.
func selfSigned(name string, key *rsa.PrivateKey, now time.Time) (uki.Signer, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return uki.Signer{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(30, 0, 0),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return uki.Signer{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return uki.Signer{Key: key, Certificate: cert}, err
}

func writeKey(dir, name string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func publicPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), err
}

func certificatePEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// LoadKeys reads the keys of a folder that MakeKeys made. PK.key and KEK.key need not be there.
func LoadKeys(dir string) (k Keys, err error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return k, fmt.Errorf("there are no keys in %s: \"mkimage keys --out %s\" makes a set", dir, dir)
	}
	k.Certificates, k.Enrol = map[string]*x509.Certificate{}, map[string][]byte{}
	for _, s := range secureBoot {
		der, err := readPEM(dir, s.name+".crt", "CERTIFICATE")
		if err != nil {
			return k, err
		}
		if k.Certificates[s.name], err = x509.ParseCertificate(der); err != nil {
			return k, fmt.Errorf("%s: %w", filepath.Join(dir, s.name+".crt"), err)
		}
		if k.Enrol[s.name+".auth"], err = os.ReadFile(filepath.Join(dir, s.name+".auth")); err != nil {
			return k, err
		}
	}
	k.Boot.Certificate = k.Certificates["db"]
	for name, to := range map[string]*crypto.Signer{"db": &k.Boot.Key, "pcr": &k.PCR, "release": &k.Release} {
		if *to, err = readKey(dir, name+".key"); err != nil {
			return k, err
		}
	}
	return k, k.check()
}

// check says what is wrong with keys that do not belong together or are of the wrong kind.
func (k Keys) check() error {
	switch {
	case k.Boot.Key == nil || k.Boot.Certificate == nil || k.PCR == nil || k.Release == nil:
		return errors.New("keys: one of db, pcr and release is missing")
	case len(k.Certificates) != len(secureBoot) || len(k.Enrol) != len(secureBoot):
		return errors.New("keys: a certificate or an .auth file of PK, KEK or db is missing")
	}
	if _, ok := k.PCR.Public().(*rsa.PublicKey); !ok {
		return fmt.Errorf("keys: pcr is %T, want RSA: all TPMs know it", k.PCR.Public())
	}
	if _, ok := k.Release.Public().(ed25519.PublicKey); !ok {
		return fmt.Errorf("keys: release is %T, want Ed25519", k.Release.Public())
	}
	if public, ok := k.Boot.Key.Public().(*rsa.PublicKey); !ok || !public.Equal(k.Boot.Certificate.PublicKey) {
		return errors.New("keys: db.key does not belong to db.crt")
	}
	return nil
}

// texts are all public parts, by their file names: what an image depends on.
func (k Keys) texts() (map[string][]byte, error) {
	out := map[string][]byte{}
	for name, c := range k.Certificates {
		out[name+".crt"] = certificatePEM(c)
	}
	for name, b := range k.Enrol {
		out[name] = b
	}
	for name, key := range map[string]crypto.Signer{"pcr.pub": k.PCR, "release.pub": k.Release} {
		b, err := publicPEM(key)
		if err != nil {
			return nil, err
		}
		out[name] = b
	}
	return out, nil
}

func readPEM(dir, name, kind string) ([]byte, error) {
	file := filepath.Join(dir, name)
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s: no PEM block %s", file, kind)
	}
	return block.Bytes, nil
}

func readKey(dir, name string) (crypto.Signer, error) {
	der, err := readPEM(dir, name, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
	}
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: %T signs nothing", filepath.Join(dir, name), key)
	}
	return s, nil
}
