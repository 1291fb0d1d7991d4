package trustd

import (
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/clock"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/version"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// maxSkew is how far the clock of a node that joins may be from the cluster's.
const maxSkew = 10 * time.Minute

// maxEndpoints bounds how many control planes are tried.
const maxEndpoints = 16

// JoinCluster makes the node a member of a cluster that there is. Until the proof is checked nothing is said about why it is refused.
func (s claimServer) JoinCluster(ctx context.Context, r *trustv1.JoinClusterRequest) (*trustv1.JoinClusterResponse, error) {
	code, token, err := s.d.mayJoin(r)
	if errs.Is(err, errs.Unauthenticated) {
		s.d.count.wrongClaims.Add(1)
		if err := s.d.delay(ctx); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	if !s.d.joining.TryLock() {
		return nil, errs.New(errs.Unavailable, "this node is about to join a cluster already; wait for the answer")
	}
	defer s.d.joining.Unlock()
	k, cert, err := s.d.askCluster(ctx, r, token)
	if err != nil {
		return nil, err
	}
	if err := s.d.joined(k, cert, code); err != nil {
		return nil, err
	}
	ca := k.node.osCA.Raw
	return &trustv1.JoinClusterResponse{Ca: ca, Role: k.node.role, Proof: claim.JoinedProof(code, r.GetChannelBinding(), ca, k.node.role)}, nil
}

// mayJoin checks who asks, and for what.
func (d *Daemon) mayJoin(r *trustv1.JoinClusterRequest) (code, token string, err error) {
	d.mu.Lock()
	code = d.code
	d.mu.Unlock()
	if k, _ := d.keys.Get(); k.owned() {
		return "", "", errs.New(errs.Precondition, "this node has an owner already")
	}
	if code == "" {
		return "", "", errs.New(errs.Unavailable, "the node has not found its storage yet; try again")
	}
	binding, wrong := r.GetChannelBinding(), errs.New(errs.Unauthenticated, "the claim code is wrong")
	if len(binding) != claim.BindingSize || !claim.Equal(claim.JoinProof(code, binding, r.GetName(), r.GetSealedToken(), r.GetEndpoints()), r.GetProof()) {
		return "", "", wrong
	}
	if token, err = claim.OpenToken(code, binding, r.GetName(), r.GetEndpoints(), r.GetSealedToken()); err != nil {
		return "", "", wrong
	}
	if !isNodeName(r.GetName()) {
		return "", "", errs.New(errs.Invalid, "name: %w", checkNode(r.GetName(), ""))
	}
	if sp, _ := d.spec.Get(); sp.hostname != "" && sp.hostname != r.GetName() {
		return "", "", errs.New(errs.Precondition, "name: %q, but Machine.hostname of this node's document says %q: join under that name, or apply another document first", r.GetName(), sp.hostname)
	}
	return code, token, checkEndpoints(r.GetEndpoints())
}

func checkEndpoints(endpoints []string) error {
	if n := len(endpoints); n == 0 || n > maxEndpoints {
		return errs.New(errs.Invalid, "endpoints: %d; give 1 to %d control planes of the cluster", n, maxEndpoints)
	}
	for _, e := range endpoints {
		host, port, err := net.SplitHostPort(e)
		if p, e := strconv.ParseUint(port, 10, 16); err != nil || host == "" || len(host) > 255 || e != nil || p == 0 {
			return errs.New(errs.Invalid, "endpoints: %.80q is no host and port, for example 10.5.0.11:50000 or [fd00::11]:50000", endpoints[0])
		}
	}
	return nil
}

// newcomer is the node's keys while it tries to join. They outlive trustd: if the answer is lost, the cluster knows the node by them when it asks again.
type newcomer struct {
	key    *ecdsa.PrivateKey
	public []byte
	csr    []byte
	seal   hpke.PrivateKey
}

type newcomerOnDisk struct {
	Key  string `json:"key"`  // PEM, PKCS #8
	Seal []byte `json:"seal"` // HPKE private key
}

func (d *Daemon) newcomer() (*newcomer, error) {
	path := filepath.Join(d.cfg.Runtime, joiningFile)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if data, err = d.makeNewcomer(); err == nil {
			err = writeFile(d.cfg.Runtime, joiningFile, data)
		}
	}
	if err != nil {
		return nil, err
	}
	var f newcomerOnDisk
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	private, err := parseKey(f.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	n := &newcomer{}
	var ok bool
	if n.key, ok = private.(*ecdsa.PrivateKey); !ok {
		return nil, fmt.Errorf("%s: no ECDSA key", path)
	}
	if n.seal, err = join.ParseSealKey(f.Seal); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if n.public, err = x509.MarshalPKIXPublicKey(&n.key.PublicKey); err != nil {
		return nil, err
	}
	n.csr, err = x509.CreateCertificateRequest(d.cfg.Random, &x509.CertificateRequest{}, n.key)
	return n, err
}

func (d *Daemon) makeNewcomer() ([]byte, error) {
	key, _, err := newNodeKey(d.cfg.Random)
	if err != nil {
		return nil, err
	}
	seal, err := join.NewSealKey()
	if err != nil {
		return nil, err
	}
	var f newcomerOnDisk
	if f.Key, err = pemKey(key); err != nil {
		return nil, err
	}
	if f.Seal, err = seal.Bytes(); err != nil {
		return nil, err
	}
	return json.Marshal(f)
}

// askCluster asks the endpoints one after the other until one gives the cluster's word, and returns what the node then is, with its certificate.
func (d *Daemon) askCluster(ctx context.Context, r *trustv1.JoinClusterRequest, token string) (*keyring, []byte, error) {
	ask, err := d.asking(ctx, token)
	if err != nil {
		return nil, nil, err
	}
	n, err := d.newcomer()
	if err != nil {
		return nil, nil, err
	}
	var said []string
	for _, endpoint := range r.GetEndpoints() {
		k, cert, err := ask(ctx, n, r, endpoint)
		if err == nil {
			// The one that answers goes first from now on.
			k.node.endpoints = slices.Concat([]string{endpoint}, slices.DeleteFunc(slices.Clone(r.GetEndpoints()), func(e string) bool { return e == endpoint }))
			return k, cert, nil
		}
		switch errs.Of(err) {
		case errs.Unavailable, errs.Precondition, errs.Internal: // not the cluster's word: it is away, or no control plane
			said = append(said, errs.Text(err))
		default:
			return nil, nil, err
		}
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
	}
	return nil, nil, errs.New(errs.Unavailable, "no control plane let this node in, nothing was changed: %s", strings.Join(said, "; "))
}

func (d *Daemon) askToJoin(ctx context.Context, n *newcomer, r *trustv1.JoinClusterRequest, endpoint, id string, secret []byte) (*keyring, []byte, error) {
	var binding []byte
	resp := &trustv1.JoinResponse{}
	err := d.call(ctx, trustv1.Join_Join_FullMethodName, endpoint, "", join.Label, func(b []byte) (proto.Message, error) {
		binding = b
		seal := n.seal.PublicKey().Bytes()
		return &trustv1.JoinRequest{TokenId: id, Name: r.GetName(), Csr: n.csr, SealKey: seal, Proof: join.NodeProof(secret, b, r.GetName(), n.csr, seal)}, nil
	}, resp)
	if err != nil {
		return nil, nil, err
	}
	if !join.Equal(join.ClusterProof(secret, binding, resp.GetOsCa(), resp.GetCertificate(), resp.GetSealed()), resp.GetProof()) {
		return nil, nil, errs.New(errs.Denied, "%s: it does not know the join token's secret: it is of another cluster, or somebody is in between. Nothing was changed", endpoint)
	}
	k, err := n.accept(r, id, resp, d.cfg.Now())
	if err != nil {
		return nil, nil, errs.New(errs.Denied, "%s: %w", endpoint, err)
	}
	return k, resp.GetCertificate(), nil
}

// accept makes a member's keys from the answer of a cluster that has proved itself.
func (n *newcomer) accept(r *trustv1.JoinClusterRequest, id string, resp *trustv1.JoinResponse, now time.Time) (*keyring, error) {
	ca, err := x509.ParseCertificate(resp.GetOsCa())
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(resp.GetCertificate())
	if err != nil {
		return nil, err
	}
	if err := checkVouched(ca, cert, r.GetName(), n.public); err != nil {
		return nil, err
	}
	// The certificate was made a moment ago. With another idea of the time this node would take nobody's certificate for valid, nor others its own.
	if made := cert.NotBefore.Add(leafBackdate); now.Before(made.Add(-maxSkew)) || now.After(made.Add(maxSkew)) {
		if text := clock.Built(now, version.BuildTime()); text != "" {
			return nil, fmt.Errorf("the cluster's clock says %s, and this node's is wrong: %s. Then try again; the token stays good for this node until it expires", made.UTC().Format(time.RFC3339), text)
		}
		return nil, fmt.Errorf("the cluster's clock says %s and this node's %s: set the clock and try again; the token stays good for this node until it expires", made.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if err := checkNode(r.GetName(), resp.GetRole()); err != nil {
		return nil, err
	}
	if !strings.Contains(resp.GetState().GetOsCa(), string(pemCert(ca.Raw))) {
		return nil, errors.New("what it trusts is not what it showed")
	}
	k := &keyring{node: &member{
		name: r.GetName(), role: resp.GetRole(), key: n.key, public: n.public, osCA: ca, state: resp.GetState(),
	}}
	if resp.GetRole() != roster.ControlPlane {
		return k, nil
	}
	plain, err := join.Open(n.seal, id, resp.GetSealed())
	if err != nil {
		return nil, fmt.Errorf("the cluster's keys cannot be opened: %w", err)
	}
	var keys clusterKeys
	if err := json.Unmarshal(plain, &keys); err != nil {
		return nil, fmt.Errorf("the cluster's keys: %w", err)
	}
	return k, k.parseKeys(&keys, ca)
}

// joined makes the node the cluster's: from the moment the file is there.
func (d *Daemon) joined(k *keyring, cert []byte, code string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if have, _ := d.keys.Get(); have.owned() || d.code != code {
		return errs.New(errs.Precondition, "this node got an owner meanwhile; remove node %q from the cluster", k.node.name)
	}
	data, err := k.file(cert)
	if err != nil {
		return err
	}
	if err := writeFile(d.folder(), nodeFile, data); err != nil {
		return err
	}
	d.code, d.known = "", k.node.state
	d.keys.Set(k)
	d.publish()
	d.report()
	d.forgetCode()
	if err := wipe(filepath.Join(d.cfg.Runtime, joiningFile)); err != nil {
		d.log.Warn("keys of the try to join not wiped", "err", err.Error())
	}
	d.log.Info("node joined", "name", k.node.name, "role", k.node.role)
	d.show("\n  This node is now " + k.node.name + ", a " + k.node.role + " of a cluster.\n\n")
	return nil
}
