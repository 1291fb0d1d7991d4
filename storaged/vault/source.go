package vault

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Lengths of keys from files, in bytes.
const (
	partitionKey = 4096 // the first bytes of a partition, all of them
	minFirmware  = 32
	maxFirmware  = 4096
)

// Place is a server that keeps keys, and who we are to it.
type Place struct {
	Address string
	Pin     string // "sha256:" and hex, of the server's public key
	// Certificate and Key are ours, DER; the server knows the certificate's digest.
	Certificate, Key []byte
}

// Relay reaches key services: storaged has no network. It does not keep what passes through it.
type Relay interface {
	// Seal lets the server encrypt a key for this node.
	Seal(context.Context, Place, secret.Bytes) ([]byte, error)
	// Unseal gets it back.
	Unseal(context.Context, Place, []byte) (secret.Bytes, error)
}

const (
	// relayTime bounds one call to a server.
	relayTime = 15 * time.Second
	// maxSealed is what a server may give us to keep, in bytes: it lies in the header.
	maxSealed = 1024
)

// readFile reads a key from where the token says.
func (v *Vault) readFile(f tokenFile) (secret.Bytes, error) {
	if f.Firmware != "" {
		path := filepath.Join(v.cfg.Firmware, filepath.FromSlash(f.Firmware), "raw")
		b, err := readSmall(path)
		if errors.Is(err, fs.ErrNotExist) {
			return secret.Bytes{}, fmt.Errorf("the firmware has no file %s", f.Firmware)
		} else if err != nil {
			return secret.Bytes{}, err
		}
		if len(b) < minFirmware || len(b) > maxFirmware {
			return secret.Bytes{}, fmt.Errorf("the firmware's file %s has %d bytes, which is no key: %d to %d are", f.Firmware, len(b), minFirmware, maxFirmware)
		}
		return secret.From(b), nil
	}
	name, err := v.partition(f.Partition)
	if err != nil {
		return secret.Bytes{}, err
	}
	dev, err := os.Open(filepath.Join(v.cfg.Dev, name))
	if err != nil {
		return secret.Bytes{}, err
	}
	defer dev.Close()
	b := make([]byte, partitionKey)
	if _, err := io.ReadFull(dev, b); err != nil {
		return secret.Bytes{}, fmt.Errorf("partition %s: %w", f.Partition, err)
	}
	if len(strings.Trim(string(b[:64]), "\x00")) == 0 {
		return secret.Bytes{}, fmt.Errorf("partition %s starts with zeros, which are no key", f.Partition)
	}
	return secret.From(b), nil
}

// partition finds the one partition of a name, and returns its device's.
func (v *Vault) partition(name string) (string, error) {
	all, err := os.ReadDir(v.cfg.Blocks)
	if err != nil {
		return "", err
	}
	var found []string
	for _, e := range all {
		text, err := os.ReadFile(filepath.Join(v.cfg.Blocks, e.Name(), "uevent"))
		if err != nil {
			continue // it went away
		}
		for line := range strings.Lines(string(text)) {
			if strings.TrimSuffix(line, "\n") == "PARTNAME="+name {
				found = append(found, e.Name())
			}
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("there is no partition %s", name)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("the partitions %s are all called %s", strings.Join(found, ", "), name)
}

// ask gets a key back from a server.
func (v *Vault) askService(ctx context.Context, s tokenService) (secret.Bytes, error) {
	if v.cfg.Relay == nil {
		return secret.Bytes{}, errors.New("this node cannot reach key services")
	}
	ctx, cancel := context.WithTimeout(ctx, relayTime)
	defer cancel()
	part, err := v.cfg.Relay.Unseal(ctx, s.place(), s.Sealed)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer part.Wipe()
	return s.key(part)
}

func (s tokenService) place() Place {
	return Place{Address: s.Address, Pin: s.Pin, Certificate: s.Certificate, Key: s.Key}
}

// key makes the keyslot's key out of the server's part and what is on the disk: neither alone opens anything.
func (s tokenService) key(part secret.Bytes) (secret.Bytes, error) {
	b, err := hkdf.Key(sha256.New, part.Expose(), s.Salt, "bulkhead key service", secretSize)
	return secret.From(b), err
}

// newService lets a server seal a new key, and returns the token and the keyslot's key.
func (v *Vault) newService(ctx context.Context, folder *os.Root, address, pin string) (tokenService, secret.Bytes, error) {
	if v.cfg.Relay == nil {
		return tokenService{}, secret.Bytes{}, errors.New("this node cannot reach key services")
	}
	id, err := identity(folder)
	if err != nil {
		return tokenService{}, secret.Bytes{}, err
	}
	s := tokenService{Address: address, Pin: pin, Certificate: id.Certificate, Key: id.Key, Salt: secret.New(secretSize).Expose()}
	part := secret.New(secretSize)
	defer part.Wipe()
	ctx, cancel := context.WithTimeout(ctx, relayTime)
	defer cancel()
	if s.Sealed, err = v.cfg.Relay.Seal(ctx, s.place(), part); err != nil {
		return tokenService{}, secret.Bytes{}, fmt.Errorf("key service %s: %w (it knows this node by sha256:%x)", address, err, sha256.Sum256(id.Certificate))
	}
	if n := len(s.Sealed); n == 0 || n > maxSealed {
		return tokenService{}, secret.Bytes{}, fmt.Errorf("key service %s: %d bytes; 1 to %d are allowed", address, n, maxSealed)
	}
	back, err := v.cfg.Relay.Unseal(ctx, s.place(), s.Sealed) // never rely on what was not tried
	if err != nil || !back.Equal(part) {
		return tokenService{}, secret.Bytes{}, errors.Join(fmt.Errorf("key service %s does not give the key back", address), err)
	}
	back.Wipe()
	key, err := s.key(part)
	return s, key, err
}

// nodeIdentity is who the node is to key services.
type nodeIdentity struct {
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key"`
}

// identityFile is on STATE, so that a server that was told the certificate's digest meets the same again.
const identityFile = "kms.json"

// identity reads the node's identity, or makes it.
func identity(folder *os.Root) (id nodeIdentity, err error) {
	f, err := folder.Open(identityFile)
	if err == nil {
		defer f.Close()
		b, err := readAll(f, identityFile)
		if err == nil {
			err = json.Unmarshal(b, &id)
		}
		return id, err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return id, err
	}
	// The digest is all that counts: the certificate says nothing, and does not end.
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bulkhead node"}, NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	if id.Certificate, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key); err != nil {
		return id, err
	}
	if id.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return id, err
	}
	data, err := json.Marshal(id)
	if err != nil {
		return id, err
	}
	return id, store(folder, identityFile, data)
}
