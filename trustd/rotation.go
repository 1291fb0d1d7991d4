package trustd

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// rotationFile holds old and new keys while authorities are replaced, and afterwards which replacement was the last. While there are keys in it, identity.json, cluster.json and
// node.json still say what they said before: an older image that does not know this file goes on with the old authorities.
const rotationFile = "rotation.json"

// authorityNames are the authorities by what people call them.
var authorityNames = map[string]string{"os": "os-ca", "etcd": "etcd-ca", "kubernetes": "kubernetes-ca", "front-proxy": "front-proxy-ca"}

// turn is the replacement of one authority.
type turn struct{ old, new *authority }

// rotation is a replacement of authorities as this node has it. It must not be changed. One without turns is over, and only its name is left.
type rotation struct {
	id, stage string
	turns     map[string]turn // by the authority's name
	token     *key            // takes the place of those that sign bearer tokens, with os-ca
	account   *key            // the same for service accounts, with kubernetes-ca
	joinKey   []byte          // with os-ca
	// cross leads from a new authority to the old one, PEM, by the authority's name: see SignCertificateResponse.chain.
	cross map[string]string
}

func (rotation) String() string { return "[secret]" }
func (turn) String() string     { return "[secret]" }

type turnOnDisk struct {
	Old authorityOnDisk `json:"old"`
	New authorityOnDisk `json:"new"`
}

type rotationOnDisk struct {
	Version    int                   `json:"version"`
	ID         string                `json:"id"`
	Stage      string                `json:"stage"`
	Turns      map[string]turnOnDisk `json:"turns,omitempty"`
	TokenKey   string                `json:"tokenKey,omitempty"`   // PEM, PKCS #8
	AccountKey string                `json:"accountKey,omitempty"` // PEM, PKCS #8
	JoinKey    []byte                `json:"joinKey,omitempty"`
}

// fresh reports whether the new authorities are those that sign.
func (r *rotation) fresh() bool { return r.stage == roster.Issue || r.stage == roster.Finish }

// final reports whether there is no way back: only one of the two authorities counts.
func (r *rotation) final() bool { return r.stage == roster.Finish || r.stage == roster.Aborted }

// newRotation makes new authorities for those in which.
func newRotation(id string, which []string, k *keyring, random io.Reader, now time.Time) (*rotation, error) {
	r := &rotation{id: id, stage: roster.Prepare, turns: map[string]turn{}}
	for _, a := range k.authorities() {
		if !slices.ContainsFunc(which, func(w string) bool { return authorityNames[w] == a.name }) {
			continue
		}
		next, err := a.successor(random, now)
		if err != nil {
			return nil, err
		}
		r.turns[a.name] = turn{old: a, new: next}
	}
	if _, ok := r.turns["os-ca"]; ok {
		_, private, err := ed25519.GenerateKey(random)
		if err != nil {
			return nil, err
		}
		token, err := newKey(private)
		if err != nil {
			return nil, err
		}
		r.token, r.joinKey = &token, make([]byte, join.KeySize)
		if _, err := io.ReadFull(random, r.joinKey); err != nil {
			return nil, err
		}
	}
	if _, ok := r.turns["kubernetes-ca"]; ok {
		private, err := ecdsa.GenerateKey(elliptic.P256(), random)
		if err != nil {
			return nil, err
		}
		account, err := newKey(private)
		if err != nil {
			return nil, err
		}
		r.account = &account
	}
	return r, r.crossSign(random, now)
}

// crossed are the authorities whose clients people and programs bring along: who knows only the old one gets there by what the server shows.
var crossed = []string{"os-ca", "kubernetes-ca"}

// crossSign has the old authorities vouch for the new ones.
func (r *rotation) crossSign(random io.Reader, now time.Time) error {
	r.cross = map[string]string{}
	for _, name := range crossed {
		t, ok := r.turns[name]
		if !ok {
			continue
		}
		serial, err := newSerial(random)
		if err != nil {
			return err
		}
		tmpl := *t.new.cert
		tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = serial, now.Add(-leafBackdate), earlier(now.Add(maxCross), t.old.cert.NotAfter)
		tmpl.MaxPathLen, tmpl.MaxPathLenZero = 0, true
		der, err := x509.CreateCertificate(random, &tmpl, t.old.cert, t.new.cert.PublicKey, t.old.key)
		if err != nil {
			return fmt.Errorf("sign %s with %s: %w", t.new.cert.Subject.CommonName, t.old.cert.Subject.CommonName, err)
		}
		r.cross[name] = string(pemCert(der)) + string(t.new.pem)
	}
	return nil
}

// maxCross is longer than any overlap.
const maxCross = 400 * day

// at is the same replacement at another stage.
func (r *rotation) at(stage string) *rotation {
	c := *r
	c.stage = stage
	return &c
}

// spent is what is left of it when the old or the new authorities are gone.
func (r *rotation) spent() *rotation { return &rotation{id: r.id, stage: r.stage} }

func (r *rotation) disk() ([]byte, error) {
	f := rotationOnDisk{Version: fileVersion, ID: r.id, Stage: r.stage, JoinKey: r.joinKey}
	for name, t := range r.turns {
		if f.Turns == nil {
			f.Turns = map[string]turnOnDisk{}
		}
		var d turnOnDisk
		var err error
		if d.Old, err = t.old.disk(); err != nil {
			return nil, err
		}
		if d.New, err = t.new.disk(); err != nil {
			return nil, err
		}
		f.Turns[name] = d
	}
	for _, k := range []struct {
		from *key
		to   *string
	}{{r.token, &f.TokenKey}, {r.account, &f.AccountKey}} {
		if k.from == nil {
			continue
		}
		var err error
		if *k.to, err = pemKey(k.from.private); err != nil {
			return nil, err
		}
	}
	return json.Marshal(f)
}

func parseRotation(data []byte) (*rotation, error) {
	var f rotationOnDisk
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	if f.Version != fileVersion {
		return nil, fmt.Errorf("version is %d; this image reads %d", f.Version, fileVersion)
	}
	if !slices.Contains([]string{roster.Prepare, roster.Issue, roster.Finish, roster.Abort, roster.Aborted}, f.Stage) || f.ID == "" {
		return nil, fmt.Errorf("replacement %q is at stage %q, which is none", f.ID, f.Stage)
	}
	r := &rotation{id: f.ID, stage: f.Stage, joinKey: f.JoinKey}
	for _, name := range slices.Sorted(maps.Keys(f.Turns)) {
		old, err := f.Turns[name].Old.parse(name)
		if err != nil {
			return nil, fmt.Errorf("old: %w", err)
		}
		next, err := f.Turns[name].New.parse(name)
		if err != nil {
			return nil, fmt.Errorf("new: %w", err)
		}
		if r.turns == nil {
			r.turns = map[string]turn{}
		}
		r.turns[name] = turn{old: old, new: next}
	}
	if len(r.turns) == 0 && !r.final() && r.stage != roster.Abort {
		return nil, errors.New("there are no keys in it")
	}
	for _, k := range []struct {
		text string
		to   **key
	}{{f.TokenKey, &r.token}, {f.AccountKey, &r.account}} {
		if k.text == "" {
			continue
		}
		keys, err := parseKeys("new key", []string{k.text})
		if err != nil {
			return nil, err
		}
		*k.to = &keys[0]
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	return r, r.crossSign(rand.Reader, time.Now())
}

// check says what is missing.
func (r *rotation) check() error {
	_, os := r.turns["os-ca"]
	_, kube := r.turns["kubernetes-ca"]
	if os != (r.token != nil) || os != (len(r.joinKey) == join.KeySize) || kube != (r.account != nil) {
		return errors.New("keys that belong to the authorities are missing")
	}
	if os {
		if _, ok := r.token.private.(ed25519.PrivateKey); !ok {
			return errors.New("token key: it is no Ed25519 key")
		}
	}
	if kube {
		if k, ok := r.account.private.(*ecdsa.PrivateKey); !ok || k.Curve != elliptic.P256() {
			return errors.New("service-account key: it is no ECDSA P-256 key")
		}
	}
	return nil
}

// readRotation reads the replacement that is under way, if any: from its file, else from what a control plane was given when it joined.
func (k *keyring) readRotation(dir string) (*keyring, error) {
	path := filepath.Join(dir, rotationFile)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	} else if err != nil {
		return nil, err
	}
	if k.os == nil {
		return k, nil // of an owner who is no more
	}
	r, err := parseRotation(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return k.turned(r), nil
}

// turned is the keyring as it is at a stage of a replacement. It is pure, and turning again changes nothing.
func (k *keyring) turned(r *rotation) *keyring {
	n := *k
	n.rot = r
	if len(r.turns) == 0 {
		return &n
	}
	n.os = r.signer(k.os)
	n.tokens = r.keys(k.tokens, r.token)
	if k.cluster == nil {
		return &n
	}
	c := *k.cluster
	c.etcd, c.kubernetes, c.frontProxy = r.signer(c.etcd), r.signer(c.kubernetes), r.signer(c.frontProxy)
	c.accounts = r.keys(c.accounts, r.account)
	if r.stage == roster.Finish && r.joinKey != nil {
		c.joinKey = r.joinKey
	}
	n.cluster = &c
	return &n
}

// signer is which authority signs in the place of a.
func (r *rotation) signer(a *authority) *authority {
	t, ok := r.turns[a.name]
	switch {
	case !ok:
		return a
	case r.fresh():
		return t.new
	}
	return t.old
}

// keys are those that count in the place of have: the one that signs first.
func (r *rotation) keys(have []key, next *key) []key {
	if next == nil {
		return have
	}
	old := slices.DeleteFunc(slices.Clone(have), func(k key) bool { return k.id == next.id })
	switch r.stage {
	case roster.Issue:
		return slices.Concat([]key{*next}, old)
	case roster.Finish:
		return []key{*next}
	case roster.Aborted:
		return old
	}
	return append(old, *next)
}

// bundle are the authorities that are trusted in the place of a, PEM, the one that signs first.
func (k *keyring) bundle(a *authority) string {
	out := string(a.pem)
	if other := k.other(a); other != nil {
		out += string(other.pem)
	}
	return out
}

// other is the authority that is trusted besides a, nil if there is none.
func (k *keyring) other(a *authority) *authority {
	if k.rot == nil || k.rot.final() {
		return nil
	}
	t, ok := k.rot.turns[a.name]
	switch {
	case !ok:
		return nil
	case k.rot.fresh():
		return t.old
	}
	return t.new
}

// chain is what a server shows with a certificate of a, see SignCertificateResponse.chain.
func (k *keyring) chain(a *authority) string {
	if k.rot == nil || k.rot.stage != roster.Issue {
		return ""
	}
	return k.rot.cross[a.name]
}

// stageOf is what others hear of the replacement.
func (k *keyring) stageOf() *trustv1.RotationStage {
	if k.rot == nil {
		return nil
	}
	return &trustv1.RotationStage{Id: k.rot.id, Stage: k.rot.stage}
}

// authoritiesID names what is trusted.
func authoritiesID(t *trustv1.TrustState) string {
	h := sha256.New()
	for _, p := range []string{t.GetOsCa(), t.GetEtcdCa(), t.GetKubernetesCa(), t.GetFrontProxyCa()} {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// generation of an authority stands in its certificate, so that who has no more than that can say it. The first had none.
func generation(c *x509.Certificate) uint32 {
	n, err := strconv.ParseUint(c.Subject.SerialNumber, 10, 16)
	if err != nil || n == 0 {
		return 1
	}
	return uint32(n)
}
