package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// fakeLife bounds how long a fake machine lives that nobody ended.
const fakeLife = 2 * time.Minute

// fakeQEMU is a program for "bhctl up" to start in the place of QEMU. It becomes a daemon as QEMU does, and is the node inside at once: its API is at the forwarded port, and
// what is on its disk is in the machine's folder. What the nodes of a cluster tell each other over their network, these do in a folder beside the machines'.
func fakeQEMU() {
	if err := fakeMachine(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func fakeMachine(args []string) error {
	if os.Getenv("FAKE_QEMU_DAEMON") == "" {
		return fakeDaemon(args)
	}
	time.AfterFunc(fakeLife, func() { os.Exit(3) })
	line := strings.Join(args, " ")
	find := func(re string) string {
		m := regexp.MustCompile(re).FindStringSubmatch(line)
		if m == nil {
			return ""
		}
		return m[1]
	}
	code, err := os.ReadFile(qemu.ClaimKeyFile)
	if err != nil {
		return err
	}
	n := &fakeNode{name: find(`-name bulkhead-(\S+)`), own: ".", shared: filepath.Join(os.Getenv("BULKHEAD_MACHINES"), ".fake")}
	if n.code, err = claim.Normalize(string(code)); err != nil {
		return err
	}
	if socket := find(`addr.path=(\S+)`); socket != "" {
		if err := fakeNIC(filepath.Base(socket)); err != nil {
			return err
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:"+find(`hostfwd=tcp:127.0.0.1:(\d+)-:50000`))
	if err != nil {
		return err
	}
	if err := os.WriteFile(find(`-pidfile (\S+)`), []byte(fmt.Sprintln(os.Getpid())), 0o600); err != nil {
		return err
	}
	ready := os.NewFile(3, "ready")
	if _, err := ready.WriteString("\n"); err != nil {
		return err
	}
	if err := ready.Close(); err != nil {
		return err
	}
	return n.serve(l)
}

// fakeDaemon starts the machine and returns when it runs.
func fakeDaemon(args []string) error {
	if m := regexp.MustCompile(`addr.path=(\S+)`).FindStringSubmatch(strings.Join(args, " ")); m != nil {
		if _, err := os.Stat(filepath.Join(filepath.Dir(m[1]), qemu.ClaimKeyFile)); err != nil {
			return fmt.Errorf("the LAN's socket is to be elsewhere than in the machine's folder: %w", err)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), "FAKE_QEMU_DAEMON=1")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	log, err := os.Create("fake.log")
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	w.Close()
	if n, err := r.Read(make([]byte, 1)); n == 0 {
		text, _ := os.ReadFile("fake.log")
		return fmt.Errorf("the fake machine ended: %w: %s", err, text)
	}
	return nil
}

// fakeNIC is where the switch plugs in.
func fakeNIC(socket string) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, c)
		}
	}()
	return nil
}

// fakeNode is a node as far as "bhctl up" sees it.
type fakeNode struct {
	trustv1.UnimplementedClaimServer
	trustv1.UnimplementedTrustServer
	trustv1.UnimplementedMembershipServer
	configv1.UnimplementedConfigServer
	machinev1.UnimplementedMachineServer
	clusterv1.UnimplementedRegistryServer
	name, code  string
	own, shared string // folders: its disk, and what the cluster knows
}

// path of a name with a folder is in the shared folder, of others on the node's own disk.
func (n *fakeNode) path(name string) string {
	if filepath.Dir(name) != "." {
		return filepath.Join(n.shared, name)
	}
	return filepath.Join(n.own, name)
}

func (n *fakeNode) put(name, text string) error {
	if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(n.path(name), []byte(text), 0o600)
}

func (n *fakeNode) get(name string) string {
	text, _ := os.ReadFile(n.path(name)) // none is an empty one
	return string(text)
}

func (n *fakeNode) serve(l net.Listener) error { return n.server().Serve(l) }

func (n *fakeNode) server() *grpc.Server { return n.serverFor(n) }

// serverFor is the node's, with somebody's Claim service.
func (n *fakeNode) serverFor(c trustv1.ClaimServer) *grpc.Server {
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		issuer, signer := fakeCertificate(client.ServerName), key // signed by itself, while the node belongs to nobody
		if n.get("member") != "" {
			if issuer, signer, err = n.authority(); err != nil {
				return nil, err
			}
		}
		der, err := x509.CreateCertificate(rand.Reader, fakeCertificate(client.ServerName), issuer, key.Public(), signer)
		return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
	}}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
	trustv1.RegisterClaimServer(s, c)
	trustv1.RegisterTrustServer(s, n)
	trustv1.RegisterMembershipServer(s, n)
	configv1.RegisterConfigServer(s, n)
	machinev1.RegisterMachineServer(s, n)
	clusterv1.RegisterRegistryServer(s, n)
	etcdv1.RegisterEtcdServer(s, fakeNoEtcd{})
	return s
}

type fakeNoEtcd struct{ etcdv1.UnimplementedEtcdServer }

func (fakeNoEtcd) GetStatus(context.Context, *etcdv1.GetStatusRequest) (*etcdv1.Status, error) {
	return &etcdv1.Status{}, nil
}

func fakeCertificate(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err)
	}
	return &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IsCA: name == "cluster", BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
}

// authority is the cluster's, made by whoever is claimed first.
func (n *fakeNode) authority() (*x509.Certificate, *ecdsa.PrivateKey, error) {
	if n.get("cluster/key") == "" {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, err
		}
		t := fakeCertificate("cluster")
		der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
		if err != nil {
			return nil, nil, err
		}
		raw, err := x509.MarshalECPrivateKey(key)
		if err := errors.Join(err, n.put("cluster/key", string(raw)), n.put("cluster/ca", string(der))); err != nil {
			return nil, nil, err
		}
	}
	key, err := x509.ParseECPrivateKey([]byte(n.get("cluster/key")))
	if err != nil {
		return nil, nil, err
	}
	ca, err := x509.ParseCertificate([]byte(n.get("cluster/ca")))
	return ca, key, err
}

var errOwned = status.Error(codes.FailedPrecondition, "somebody owns this node")

func (n *fakeNode) Claim(ctx context.Context, r *trustv1.ClaimRequest) (*trustv1.ClaimResponse, error) {
	binding, err := fakeBinding(ctx)
	if err != nil {
		return nil, err
	}
	if n.get("member") != "" {
		return nil, errOwned
	}
	if !claim.Equal(r.Proof, claim.ClientProof(n.code, binding, r.Csr)) {
		return nil, status.Error(codes.Unauthenticated, "wrong code")
	}
	csr, err := x509.ParseCertificateRequest(r.Csr)
	if err != nil {
		return nil, err
	}
	ca, key, err := n.authority()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, fakeCertificate(r.Name), ca, csr.PublicKey, key)
	if err := errors.Join(err, n.put("member", "claimed"), n.put("members/"+n.name, "controlplane")); err != nil {
		return nil, err
	}
	return &trustv1.ClaimResponse{Ca: ca.Raw, Certificate: der, Proof: claim.ServerProof(n.code, binding, ca.Raw, der)}, nil
}

func (n *fakeNode) JoinCluster(ctx context.Context, r *trustv1.JoinClusterRequest) (*trustv1.JoinClusterResponse, error) {
	binding, err := fakeBinding(ctx)
	if err != nil {
		return nil, err
	}
	if n.get("member") != "" {
		return nil, errOwned
	}
	if !claim.Equal(r.Proof, claim.JoinProof(n.code, binding, r.Name, r.SealedToken, r.Endpoints)) {
		return nil, status.Error(codes.Unauthenticated, "wrong code")
	}
	token, err := claim.OpenToken(n.code, binding, r.Name, r.Endpoints, r.SealedToken)
	role := n.get("tokens/" + r.Name)
	ca, _, caErr := n.authority()
	if err := errors.Join(err, caErr); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(ca.Raw)
	switch {
	case r.Name != n.name || token != "TOKEN-"+n.name && token != attest.Invitation(hex.EncodeToString(digest[:])) || role == "":
		return nil, status.Error(codes.Unauthenticated, "the cluster refused the token")
	case n.get("members/"+r.Name) != "":
		return nil, status.Errorf(codes.AlreadyExists, "there is a node %s", r.Name)
	}
	if err := errors.Join(n.put("member", "joined"), n.put("members/"+n.name, role), n.put("endpoints/"+n.name, strings.Join(r.Endpoints, " ")+"\n")); err != nil {
		return nil, err
	}
	return &trustv1.JoinClusterResponse{Ca: ca.Raw, Role: role, Proof: claim.JoinedProof(n.code, binding, ca.Raw, role)}, nil
}

func fakeBinding(ctx context.Context) ([]byte, error) {
	p, _ := peer.FromContext(ctx)
	return claim.Binding(p.AuthInfo.(credentials.TLSInfo).State)
}

func (n *fakeNode) Bootstrap(context.Context, *trustv1.BootstrapRequest) (*trustv1.BootstrapResponse, error) {
	already := n.get("cluster/bootstrapped") != ""
	return &trustv1.BootstrapResponse{Already: already}, n.put("cluster/bootstrapped", "yes")
}

// The first token is refused: right after Bootstrap etcd is not there yet.
func (n *fakeNode) MakeJoinToken(_ context.Context, r *trustv1.MakeJoinTokenRequest) (*trustv1.MakeJoinTokenResponse, error) {
	if n.get("cluster/etcd") == "" {
		return nil, errors.Join(n.put("cluster/etcd", "yes"), status.Error(codes.Unavailable, "etcd has no leader yet"))
	}
	return &trustv1.MakeJoinTokenResponse{Token: "TOKEN-" + r.Name, Id: r.Name}, n.put("tokens/"+r.Name, r.Role)
}

func (n *fakeNode) members() []string {
	found, _ := filepath.Glob(filepath.Join(n.shared, "members", "*"))
	return found
}

func (n *fakeNode) ListMembers(context.Context, *trustv1.ListMembersRequest) (*trustv1.ListMembersResponse, error) {
	r := &trustv1.ListMembersResponse{}
	for _, f := range n.members() {
		r.Members = append(r.Members, &trustv1.ClusterMember{Name: filepath.Base(f), Role: n.get("members/" + filepath.Base(f))})
	}
	return r, nil
}

func (n *fakeNode) RemoveMember(_ context.Context, r *trustv1.RemoveMemberRequest) (*trustv1.RemoveMemberResponse, error) {
	return &trustv1.RemoveMemberResponse{}, os.Remove(filepath.Join(n.shared, "members", r.Name))
}

func (n *fakeNode) ListNodes(context.Context, *clusterv1.ListNodesRequest) (*clusterv1.ListNodesResponse, error) {
	r := &clusterv1.ListNodesResponse{}
	for _, f := range n.members() {
		name := filepath.Base(f)
		node := &clusterv1.Node{Name: name, Role: n.get("members/" + name), State: "not ready", Detail: "no configuration"}
		if n.get("config/"+name) != "" {
			node.State, node.Detail = "ready", ""
		}
		r.Nodes = append(r.Nodes, node)
	}
	return r, nil
}

func (n *fakeNode) Get(context.Context, *configv1.GetRequest) (*configv1.GetResponse, error) {
	if n.get("document") == "" {
		return nil, status.Error(codes.NotFound, "there is no configuration yet")
	}
	return &configv1.GetResponse{Documents: n.get("document")}, nil
}

func (n *fakeNode) Apply(_ context.Context, r *configv1.ApplyRequest) (*configv1.ApplyResponse, error) {
	if n.get("document") != "" {
		return nil, status.Error(codes.Internal, "up applied again")
	}
	return &configv1.ApplyResponse{}, errors.Join(n.put("document", r.Documents), n.put("config/"+n.name, r.Documents))
}

// GetHealth is bad once, as of a node that has just got its document.
func (n *fakeNode) GetHealth(context.Context, *machinev1.GetHealthRequest) (*machinev1.GetHealthResponse, error) {
	well := n.get("asked") != ""
	return &machinev1.GetHealthResponse{Healthy: well, Checks: []*machinev1.Check{{Name: "kubernetes.converged", Ok: well, Detail: "wait for kube-apiserver"}}}, n.put("asked", "once")
}

func (n *fakeNode) GetVersion(context.Context, *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	return &machinev1.GetVersionResponse{Version: "v1-" + n.name}, nil
}
