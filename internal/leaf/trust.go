package leaf

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
)

// Roots is what the node trusts at one moment. A pool is nil until its authority exists. It must not be changed.
type Roots struct {
	// State is as trustd sent it, with the PEM texts of the same authorities; never nil.
	State *trustv1.TrustState
	// Known is false until trustd has said its first word.
	Known                            bool
	OS, Etcd, Kubernetes, FrontProxy *x509.CertPool
}

// Trust follows trustd's WatchTrust. Make it with NewTrust; Run must be called once.
type Trust struct {
	signer trustv1.SignerClient
	log    *slog.Logger
	cell   latest.Cell[*Roots]
}

// NewTrust returns a Trust that knows nothing yet.
func NewTrust(signer trustv1.SignerClient, log *slog.Logger) *Trust {
	t := &Trust{signer: signer, log: log}
	t.cell.Set(&Roots{State: &trustv1.TrustState{}})
	return t
}

// Roots returns what is trusted now, and a channel that is closed when that changes. What was known last stays while trustd restarts.
func (t *Trust) Roots() (*Roots, <-chan struct{}) { return t.cell.Get() }

// Run follows until ctx is done; it returns ctx's error. It survives restarts of trustd.
func (t *Trust) Run(ctx context.Context) error {
	said := ""
	for {
		err := t.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if text := errs.Text(err); text != said && !errs.Is(err, errs.Unavailable) { // trustd restarting is no news
			t.log.Warn("trust cannot be followed", "err", text)
			said = text
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(firstPause):
		}
	}
}

func (t *Trust) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := t.signer.WatchTrust(ctx, &trustv1.WatchTrustRequest{})
	for err == nil {
		var s *trustv1.TrustState
		if s, err = stream.Recv(); err == nil {
			err = t.set(s)
		}
	}
	return err
}

func (t *Trust) set(s *trustv1.TrustState) error {
	// An empty list says that the cluster's state cannot be read just now, for a node is in its own list: what was known last still holds.
	if last, _ := t.cell.Get(); len(s.GetNodes()) == 0 && s.GetClaimed() && s.GetNodeName() == last.State.GetNodeName() {
		s.Nodes = last.State.GetNodes()
	}
	r := &Roots{State: s, Known: true}
	for _, a := range []struct {
		name, pem string
		pool      **x509.CertPool
	}{{"os", s.GetOsCa(), &r.OS}, {"etcd", s.GetEtcdCa(), &r.Etcd}, {"kubernetes", s.GetKubernetesCa(), &r.Kubernetes}, {"front proxy", s.GetFrontProxyCa(), &r.FrontProxy}} {
		if a.pem == "" {
			continue
		}
		*a.pool = x509.NewCertPool()
		if !(*a.pool).AppendCertsFromPEM([]byte(a.pem)) {
			return fmt.Errorf("%s authority from trustd: no certificate in its PEM", a.name)
		}
	}
	t.cell.Set(r)
	return nil
}

// Wait returns once trustd has said its first word, or ctx's error.
func (t *Trust) Wait(ctx context.Context) error {
	for {
		r, changed := t.cell.Get()
		if r.Known {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
