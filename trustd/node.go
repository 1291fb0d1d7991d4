package trustd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// member is the node's own place in its cluster. It must not be changed.
type member struct {
	name, role string
	first      bool // the cluster was made here; its keys are in files of their own
	key        *ecdsa.PrivateKey
	public     []byte // SubjectPublicKeyInfo
	osCA       *x509.Certificate
	endpoints  []string // of control planes, from the operator who let it join
	state      *trustv1.TrustState
}

func (member) String() string { return "[secret]" }

// nodeOnDisk is all of a node that joined, in one file: after a power cut it has joined or not.
type nodeOnDisk struct {
	Version     int             `json:"version"`
	Name        string          `json:"name"`
	Role        string          `json:"role"`
	First       bool            `json:"first,omitempty"`
	Key         string          `json:"key"`                   // PEM, PKCS #8
	Certificate string          `json:"certificate,omitempty"` // PEM; the cluster's word, of a day's life: the key is what counts
	OSCA        string          `json:"osCA,omitempty"`        // PEM
	Endpoints   []string        `json:"endpoints,omitempty"`
	State       json.RawMessage `json:"state,omitempty"` // TrustState of the moment it joined
	// Keys are those of the cluster; only of a control plane that joined.
	Keys *clusterKeys `json:"keys,omitempty"`
}

// clusterKeys is what a control plane gets, sealed to it.
type clusterKeys struct {
	Identity json.RawMessage `json:"identity"` // as identity.json
	Cluster  json.RawMessage `json:"cluster"`  // as cluster.json
	// Rotation is as rotation.json, if authorities are being replaced; a file of that name counts more.
	Rotation json.RawMessage `json:"rotation,omitempty"`
}

func newNodeKey(random io.Reader) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	return key, public, err
}

// digest names the node's key.
func (n *member) digest() string { return join.Digest(n.public) }

// readNode reads the node's place in its cluster, and the cluster's keys if they are with it.
func (k *keyring) readNode(dir string) error {
	path := filepath.Join(dir, nodeFile)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := k.parseNode(data); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (k *keyring) parseNode(data []byte) error {
	var f nodeOnDisk
	if err := json.Unmarshal(data, &f); err != nil {
		return err
	}
	if f.Version != fileVersion {
		return fmt.Errorf("version is %d; this image reads %d", f.Version, fileVersion)
	}
	private, err := parseKey(f.Key)
	if err != nil {
		return fmt.Errorf("node key: %w", err)
	}
	key, ok := private.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return errors.New("node key: it is no ECDSA P-256 key")
	}
	n := &member{name: f.Name, role: f.Role, first: f.First, key: key, endpoints: f.Endpoints}
	if n.public, err = x509.MarshalPKIXPublicKey(&key.PublicKey); err != nil {
		return err
	}
	if err := checkNode(f.Name, f.Role); err != nil {
		return err
	}
	if f.First {
		k.node = n
		return nil
	}
	block, _ := pem.Decode([]byte(f.OSCA))
	if block == nil {
		return errors.New("osCA: no PEM certificate")
	}
	if n.osCA, err = x509.ParseCertificate(block.Bytes); err != nil {
		return fmt.Errorf("osCA: %w", err)
	}
	n.state = &trustv1.TrustState{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(f.State, n.state); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if (f.Role == string(config.ControlPlane)) != (f.Keys != nil) {
		return fmt.Errorf("a node of role %q, and the cluster's keys are there: %v", f.Role, f.Keys != nil)
	}
	if f.Keys != nil {
		if err := k.parseKeys(f.Keys, n.osCA); err != nil {
			return err
		}
	}
	k.node = n
	return nil
}

// parseKeys takes the cluster's keys over, if they are those of the authority that vouched for them.
func (k *keyring) parseKeys(keys *clusterKeys, osCA *x509.Certificate) error {
	if err := k.parseIdentity(keys.Identity); err != nil {
		return fmt.Errorf("keys: identity: %w", err)
	}
	if !k.os.cert.Equal(osCA) {
		return errors.New("keys: they are of another cluster than the certificate")
	}
	c, err := parseCluster(keys.Cluster)
	if err != nil {
		return fmt.Errorf("keys: cluster: %w", err)
	}
	k.cluster = c
	if len(keys.Rotation) > 0 {
		r, err := parseRotation(keys.Rotation)
		if err != nil {
			return fmt.Errorf("keys: rotation: %w", err)
		}
		*k = *k.turned(r)
	}
	return nil
}

// keys are what another control plane needs.
func (k *keyring) keys() (*clusterKeys, error) {
	identity, err := k.identity()
	if err != nil {
		return nil, err
	}
	cluster, err := k.cluster.disk()
	if err != nil {
		return nil, err
	}
	out := &clusterKeys{Identity: identity, Cluster: cluster}
	if k.rot != nil && len(k.rot.turns) > 0 {
		out.Rotation, err = k.rot.disk()
	}
	return out, err
}

// file is the node's file.
func (k *keyring) file(certificate []byte) ([]byte, error) {
	n := k.node
	text, err := pemKey(n.key)
	if err != nil {
		return nil, err
	}
	f := nodeOnDisk{Version: fileVersion, Name: n.name, Role: n.role, First: n.first, Key: text, Endpoints: n.endpoints}
	if n.first {
		return json.Marshal(f)
	}
	f.OSCA = string(pemCert(n.osCA.Raw))
	if certificate != nil {
		f.Certificate = string(pemCert(certificate))
	}
	if f.State, err = protojson.Marshal(n.state); err != nil {
		return nil, err
	}
	if k.cluster != nil {
		if f.Keys, err = k.keys(); err != nil {
			return nil, err
		}
	}
	return json.Marshal(f)
}

// osPEM is the authority for Bulkhead's API that the node trusts, "" if there is none.
func (k *keyring) osPEM() string {
	switch {
	case k.os != nil:
		return string(k.os.pem)
	case k.node != nil:
		return string(pemCert(k.node.osCA.Raw))
	}
	return ""
}

// checkNode checks a node's name and role.
func checkNode(name, role string) error {
	if !isNodeName(name) {
		return fmt.Errorf("node name %.80q: allowed are 1 to 63 lower-case letters, digits, - and . as in RFC 1123, what Machine.hostname takes", name)
	}
	if role != string(config.ControlPlane) && role != string(config.Worker) {
		return fmt.Errorf("node role %.80q: allowed are %q and %q", role, config.ControlPlane, config.Worker)
	}
	return nil
}

func isNodeName(name string) bool {
	ok := len(name) >= 1 && len(name) <= 63 && name != "localhost" && strings.Trim(name, "0123456789.") != "" // no address
	for l := range strings.SplitSeq(name, ".") {
		ok = ok && l != "" && l[0] != '-' && l[len(l)-1] != '-' && strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	return ok
}

// misplaced says why nothing may be signed here for the names in the document: the node is another one in its cluster. It is pure.
func misplaced(n *member, s *spec, others int) error {
	switch {
	case n == nil || s.hostname == "" || s.hostname == n.name:
		return nil
	case n.first && others == 0:
		return nil // nobody else knows it under its name: it is called anew
	}
	return errs.New(errs.Precondition, "this node is %q in its cluster and Machine.hostname says %q: set it to the former, or remove the node from the cluster, reset it and let it join anew", n.name, s.hostname)
}

// misrole says why a node does not do what its document wants. It is pure.
func misrole(n *member, s *spec) error {
	if n == nil || s.role == "" || string(s.role) == n.role {
		return nil
	}
	return errs.New(errs.Precondition, "the cluster let this node in as %q and Machine.role says %q: set Machine.role to %q, or make it join anew with another token", n.role, s.role, n.role)
}

// spec is the specification with what the cluster says of the node: its name also before there is a document.
func (k *keyring) spec(s *spec) *spec {
	if k.node == nil && k.cluster == nil {
		return s
	}
	c := *s
	c.member = roster.ControlPlane
	if k.node != nil {
		c.member, c.key = k.node.role, k.node.digest()
		if c.hostname == "" {
			c.hostname = k.node.name
		}
	}
	return &c
}

// readKnown reads what was last heard of the cluster, nil if that is nothing or of another cluster.
func readKnown(dir, osCA string) (*trustv1.TrustState, error) {
	path := filepath.Join(dir, knownFile)
	data, err := readFile(path)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	t := &trustv1.TrustState{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if osCA == "" || !strings.Contains(t.GetOsCa(), osCA) {
		return nil, fmt.Errorf("%s: it is of another cluster", path)
	}
	return t, nil
}

// learn takes over what was heard of the cluster: for what others trust, and for the time when nobody answers.
func (d *Daemon) learn(t *trustv1.TrustState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if proto.Equal(t, d.known) {
		return
	}
	d.known = t
	if d.where == durable {
		if err := d.keep(t); err != nil {
			d.log.Warn("what is known of the cluster is not kept", "err", err.Error())
		} else {
			d.kept = t
		}
	}
	d.publish()
	d.report()
}

// keep writes what was heard of the cluster. A worker takes the authority that signs now for the one that let it in: in the end it is the only one. The caller holds d.mu.
func (d *Daemon) keep(t *trustv1.TrustState) error {
	data, err := protojson.Marshal(t)
	if err != nil {
		return err
	}
	if err := writeFile(d.cfg.StateDir, knownFile, data); err != nil {
		return err
	}
	k, _ := d.keys.Get()
	block, _ := pem.Decode([]byte(t.GetOsCa()))
	if !k.worker() || block == nil || bytes.Equal(block.Bytes, k.node.osCA.Raw) {
		return nil
	}
	next, n := *k, *k.node
	if n.osCA, err = x509.ParseCertificate(block.Bytes); err != nil {
		return err
	}
	n.state, next.node = t, &n
	if data, err = next.file(nil); err != nil {
		return err
	}
	if err := writeFile(d.cfg.StateDir, nodeFile, data); err != nil {
		return err
	}
	d.keys.Set(&next)
	d.log.Info("the cluster's authority is another one now", "authority", n.osCA.Subject.CommonName)
	return nil
}

// keeps reports whether what a worker trusts is on its disk, so that it goes on with it after its power failed.
func (d *Daemon) keeps(t *trustv1.TrustState) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.kept != nil && d.kept == d.known && proto.Equal(d.known.GetRotation(), t.GetRotation())
}

// others is how many other nodes are known. The caller holds d.mu.
func (d *Daemon) others(n *member) int {
	count := 0
	for _, o := range d.known.GetNodes() {
		if n == nil || o.GetKey() != n.digest() {
			count++
		}
	}
	return count
}
