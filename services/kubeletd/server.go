package kubeletd

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Lives of a person's certificate.
const (
	standardLife = 24 * time.Hour
	longestLife  = 30 * 24 * time.Hour
)

type server struct {
	kubernetesv1.UnimplementedKubernetesServer
	d *Daemon
}

func (s *server) GetStatus(context.Context, *kubernetesv1.GetStatusRequest) (*kubernetesv1.Status, error) {
	st, _ := s.d.status.Get()
	return st, nil
}

func (s *server) WatchStatus(_ *kubernetesv1.WatchStatusRequest, out grpc.ServerStreamingServer[kubernetesv1.Status]) error {
	return s.d.status.Watch(out.Context(), out.Send)
}

// GetKubeconfig makes a key, has it certified, and forgets it.
func (s *server) GetKubeconfig(ctx context.Context, r *kubernetesv1.GetKubeconfigRequest) (*kubernetesv1.GetKubeconfigResponse, error) {
	want, generation := s.d.loop.Spec()
	if generation == 0 {
		return nil, errs.New(errs.Precondition, "the node has no configuration yet; run: bhctl apply")
	}
	life := time.Duration(r.GetTtlSeconds()) * time.Second
	if r.GetTtlSeconds() > uint64(longestLife/time.Second) {
		return nil, errs.New(errs.Invalid, "ttl_seconds: %d; at most %d (30 days)", r.GetTtlSeconds(), longestLife/time.Second)
	}
	if life == 0 {
		life = standardLife
	}
	user := r.GetUser()
	if user == "" {
		user = peer.CallerFrom(ctx).Name
	}
	if user == "" {
		user = "admin"
	}
	s.d.kernel.mu.Lock()
	address := s.d.kernel.last.Address
	s.d.kernel.mu.Unlock()
	server, err := serverURL(r.GetServer(), want.Endpoint, address)
	if err != nil {
		return nil, err
	}
	cert, key, ca, err := s.d.kernel.adminPair(ctx, user, life)
	if err != nil {
		return nil, err
	}
	if roots, _ := s.d.kernel.trust.Roots(); strings.Contains(roots.State.GetKubernetesCa(), ca) {
		ca = roots.State.GetKubernetesCa() // while it is replaced, the other one too
	}
	text, err := kubeconfig(want.Cluster, server, user, ca, cert, key)
	if err != nil {
		return nil, err
	}
	out := &kubernetesv1.GetKubeconfigResponse{Kubeconfig: text}
	if b, _ := pem.Decode(cert); b != nil {
		if c, err := x509.ParseCertificate(b.Bytes); err == nil {
			out.Expires = timestamppb.New(c.NotAfter)
		}
	}
	return out, nil
}

// serverURL chooses the address in a kubeconfig: the caller's, the cluster's, the node's.
func serverURL(asked, endpoint string, address netip.Addr) (string, error) {
	if asked != "" {
		u, err := url.Parse(asked)
		if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || len(asked) > 512 {
			return "", errs.New(errs.Invalid, "server: %.512q is not a URL like \"https://10.0.0.5:6443\"", asked)
		}
		return trimSlash(asked), nil
	}
	if endpoint != "" {
		return trimSlash(endpoint), nil
	}
	if !address.IsValid() {
		return "", errs.New(errs.Unavailable, "the node has no address yet; name one in server")
	}
	return "https://" + netip.AddrPortFrom(address, 6443).String(), nil
}

// kubeconfig is the file that kubectl reads; the byte slices are in it as base64.
func kubeconfig(cluster, server, user, ca string, cert, key []byte) (string, error) {
	type named map[string]any
	context := user + "@" + cluster
	out, err := yaml.Marshal(named{
		"apiVersion": "v1", "kind": "Config", "current-context": context,
		"clusters": []named{{"name": cluster, "cluster": named{"server": server, "certificate-authority-data": base64Of([]byte(ca))}}},
		"users":    []named{{"name": context, "user": named{"client-certificate-data": base64Of(cert), "client-key-data": base64Of(key)}}},
		"contexts": []named{{"name": context, "context": named{"cluster": cluster, "user": context}}},
	})
	return string(out), err
}
