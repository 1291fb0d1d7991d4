package trustd

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/join"
)

// keyring is all that trustd guards. It is never changed, only replaced. It has no text form on purpose.
type keyring struct {
	os      *authority // nil: nobody owns the node, or it has no authority of its own (a worker)
	tokens  []key      // newest first; Ed25519
	cluster *cluster   // nil: not bootstrapped
	node    *member    // nil: not in a cluster of nodes
	rot     *rotation  // the newest replacement of authorities; nil: there was none. All above is as it is at its stage
}

// owned reports whether the node belongs to somebody.
func (k *keyring) owned() bool { return k.os != nil || k.node != nil }

// worker reports whether the node is in a cluster and has none of its keys.
func (k *keyring) worker() bool { return k.os == nil && k.node != nil }

// cluster is what Bootstrap makes.
type cluster struct {
	etcd, kubernetes, frontProxy *authority
	accounts                     []key  // sign service-account tokens, newest first; ECDSA P-256
	secrets                      []seal // encrypt Kubernetes' secrets, newest first
	joinKey                      []byte // secrets of join tokens come from it; nil in a file of an older image
}

// key is a signing key with the name under which it is published.
type key struct {
	id      string
	private crypto.Signer
	public  []byte // PKIX, DER
}

// seal is an AES-256 key.
type seal struct {
	id  string
	aes []byte
}

func (keyring) String() string { return "[secret]" }
func (cluster) String() string { return "[secret]" }
func (key) String() string     { return "[secret]" }
func (seal) String() string    { return "[secret]" }

// The files on STATE. The previous image must be able to read what this one writes: fields are only added.
const fileVersion = 1

type authorityOnDisk struct {
	Certificate string `json:"certificate"` // PEM
	Key         string `json:"key"`         // PEM, PKCS #8
}
type sealOnDisk struct {
	ID  string `json:"id"`
	Key []byte `json:"key"`
}
type identityOnDisk struct {
	Version   int             `json:"version"`
	OS        authorityOnDisk `json:"os"`
	TokenKeys []string        `json:"tokenKeys"` // PEM, PKCS #8
}
type clusterOnDisk struct {
	Version         int             `json:"version"`
	Etcd            authorityOnDisk `json:"etcd"`
	Kubernetes      authorityOnDisk `json:"kubernetes"`
	FrontProxy      authorityOnDisk `json:"frontProxy"`
	ServiceAccounts []string        `json:"serviceAccounts"` // PEM, PKCS #8
	Secrets         []sealOnDisk    `json:"secrets"`
	JoinKey         []byte          `json:"joinKey,omitempty"`
}

// newIdentity makes what Claim needs, and the file that holds it.
func newIdentity(random io.Reader, now time.Time) (*keyring, []byte, error) {
	ca, err := newAuthority("os-ca", random, now)
	if err != nil {
		return nil, nil, err
	}
	_, private, err := ed25519.GenerateKey(random)
	if err != nil {
		return nil, nil, err
	}
	token, err := newKey(private)
	if err != nil {
		return nil, nil, err
	}
	k := &keyring{os: ca, tokens: []key{token}}
	data, err := k.identity()
	return k, data, err
}

// identity is the file with the node's owner's keys.
func (k *keyring) identity() ([]byte, error) {
	file := identityOnDisk{Version: fileVersion}
	var err error
	if file.OS, err = k.os.disk(); err != nil {
		return nil, err
	}
	if file.TokenKeys, err = pemKeys(k.tokens); err != nil {
		return nil, err
	}
	return json.Marshal(file)
}

// newCluster makes what Bootstrap needs, and the file that holds it.
func newCluster(random io.Reader, now time.Time) (*cluster, []byte, error) {
	c := &cluster{joinKey: make([]byte, join.KeySize)}
	for _, a := range []struct {
		name string
		to   **authority
	}{{"etcd-ca", &c.etcd}, {"kubernetes-ca", &c.kubernetes}, {"front-proxy-ca", &c.frontProxy}} {
		ca, err := newAuthority(a.name, random, now)
		if err != nil {
			return nil, nil, err
		}
		*a.to = ca
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, nil, err
	}
	account, err := newKey(private)
	if err != nil {
		return nil, nil, err
	}
	s := seal{aes: make([]byte, 32)}
	if _, err := io.ReadFull(random, s.aes); err != nil {
		return nil, nil, err
	}
	if _, err := io.ReadFull(random, c.joinKey); err != nil {
		return nil, nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, nil, err
	}
	s.id = "kms-" + serial.Text(16)[:16] // must tell nothing of the key: random
	c.accounts, c.secrets = []key{account}, []seal{s}
	data, err := c.disk()
	return c, data, err
}

// disk is the file with the cluster's keys.
func (c *cluster) disk() ([]byte, error) {
	file := clusterOnDisk{Version: fileVersion, JoinKey: c.joinKey}
	for _, a := range []struct {
		from *authority
		to   *authorityOnDisk
	}{{c.etcd, &file.Etcd}, {c.kubernetes, &file.Kubernetes}, {c.frontProxy, &file.FrontProxy}} {
		var err error
		if *a.to, err = a.from.disk(); err != nil {
			return nil, err
		}
	}
	for _, s := range c.secrets {
		file.Secrets = append(file.Secrets, sealOnDisk{ID: s.id, Key: s.aes})
	}
	var err error
	if file.ServiceAccounts, err = pemKeys(c.accounts); err != nil {
		return nil, err
	}
	return json.Marshal(file)
}

// readKeyring reads the keys in a folder, as they are at the stage of a replacement of authorities; files that are not there leave their part empty.
func readKeyring(dir string) (*keyring, error) {
	k, err := readBase(dir)
	if err != nil {
		return nil, err
	}
	return k.readRotation(dir)
}

// readBase reads all but the file of a replacement.
func readBase(dir string) (*keyring, error) {
	k := &keyring{}
	if err := k.readNode(dir); err != nil || k.node != nil && !k.node.first {
		return k, err // all of one that joined is in that file
	}
	path := filepath.Join(dir, identityFile)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		// A cluster without an owner cannot be: Bootstrap asks for one. Its file was lost, and whoever claims the node must not get the cluster.
		for _, other := range []string{clusterFile, nodeFile} {
			if _, err := os.Lstat(filepath.Join(dir, other)); err == nil {
				return nil, fmt.Errorf("%s: it is missing, but %s is there: bring it back from a backup, or remove both to start anew", path, other)
			} else if !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
		return k, nil
	} else if err != nil {
		return nil, err
	}
	if err := k.parseIdentity(data); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	path = filepath.Join(dir, clusterFile)
	if data, err = readFile(path); errors.Is(err, fs.ErrNotExist) {
		return k, nil
	} else if err != nil {
		return nil, err
	}
	if k.cluster, err = parseCluster(data); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return k, nil
}

func (k *keyring) parseIdentity(data []byte) error {
	var f identityOnDisk
	if err := json.Unmarshal(data, &f); err != nil {
		return err
	}
	if f.Version != fileVersion {
		return fmt.Errorf("version is %d; this image reads %d", f.Version, fileVersion)
	}
	ca, err := f.OS.parse("os-ca")
	if err != nil {
		return err
	}
	tokens, err := parseKeys("token key", f.TokenKeys)
	if err != nil {
		return err
	}
	for _, t := range tokens {
		if _, ok := t.private.(ed25519.PrivateKey); !ok {
			return fmt.Errorf("token key %s: it is no Ed25519 key", t.id)
		}
	}
	k.os, k.tokens = ca, tokens
	return nil
}

func parseCluster(data []byte) (*cluster, error) {
	var f clusterOnDisk
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Version != fileVersion {
		return nil, fmt.Errorf("version is %d; this image reads %d", f.Version, fileVersion)
	}
	c := &cluster{}
	var err, e error
	c.etcd, e = f.Etcd.parse("etcd-ca")
	err = errors.Join(err, e)
	c.kubernetes, e = f.Kubernetes.parse("kubernetes-ca")
	err = errors.Join(err, e)
	c.frontProxy, e = f.FrontProxy.parse("front-proxy-ca")
	err = errors.Join(err, e)
	c.accounts, e = parseKeys("service-account key", f.ServiceAccounts)
	err = errors.Join(err, e)
	for _, a := range c.accounts {
		if k, ok := a.private.(*ecdsa.PrivateKey); !ok || k.Curve != elliptic.P256() {
			err = errors.Join(err, fmt.Errorf("service-account key %s: it is no ECDSA P-256 key", a.id))
		}
	}
	if c.joinKey = f.JoinKey; len(c.joinKey) != 0 && len(c.joinKey) != join.KeySize {
		err = errors.Join(err, fmt.Errorf("join key: %d bytes, must be %d", len(c.joinKey), join.KeySize))
	}
	if len(f.Secrets) == 0 {
		err = errors.Join(err, errors.New("secrets: no key"))
	}
	for _, s := range f.Secrets {
		if s.ID == "" || len(s.Key) != 32 {
			err = errors.Join(err, fmt.Errorf("secrets: key %q has %d bytes, must have a name and 32", s.ID, len(s.Key)))
		}
		c.secrets = append(c.secrets, seal{id: s.ID, aes: s.Key})
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (a *authority) disk() (authorityOnDisk, error) {
	text, err := pemKey(a.key)
	return authorityOnDisk{Certificate: string(a.pem), Key: text}, err
}

func (f authorityOnDisk) parse(name string) (*authority, error) {
	block, _ := pem.Decode([]byte(f.Certificate))
	if block == nil {
		return nil, fmt.Errorf("authority %s: no PEM certificate", name)
	}
	private, err := parseKey(f.Key)
	if err != nil {
		return nil, fmt.Errorf("authority %s: %w", name, err)
	}
	k, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("authority %s: key is no ECDSA key", name)
	}
	return parseAuthority(name, block.Bytes, k)
}

func parseKeys(what string, texts []string) ([]key, error) {
	if len(texts) == 0 {
		return nil, fmt.Errorf("%s: there is none", what)
	}
	var keys []key
	for _, t := range texts {
		private, err := parseKey(t)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		k, err := newKey(private)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

func newKey(private crypto.Signer) (key, error) {
	public, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return key{}, err
	}
	return key{id: keyID(public), private: private, public: public}, nil
}

func parseKey(text string) (crypto.Signer, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("no PEM key")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", k)
	}
	return s, nil
}

func pemKeys(keys []key) ([]string, error) {
	var out []string
	for _, k := range keys {
		text, err := pemKey(k.private)
		if err != nil {
			return nil, err
		}
		out = append(out, text)
	}
	return out, nil
}

func pemKey(private crypto.Signer) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(private)
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), err
}
