package leaf

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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
	told   chan struct{} // one slot; something is to be reported to trustd

	mu     sync.Mutex
	leaves []*Leaf           // guarded by mu
	acts   func(*Roots) bool // guarded by mu; nil: at once
}

// Bundle is the text of authorities (PEM) in an order that does not depend on which one signs, for programs that must start anew when it changes.
func Bundle(text string) string {
	parts := strings.SplitAfter(text, "-----END CERTIFICATE-----\n")
	slices.Sort(parts)
	return strings.Join(parts, "")
}

// NewTrust returns a Trust that knows nothing yet.
func NewTrust(signer trustv1.SignerClient, log *slog.Logger) *Trust {
	t := &Trust{signer: signer, log: log, told: make(chan struct{}, 1)}
	t.cell.Set(&Roots{State: &trustv1.TrustState{}})
	return t
}

// Roots returns what is trusted now, and a channel that is closed when that changes. What was known last stays while trustd restarts.
func (t *Trust) Roots() (*Roots, <-chan struct{}) { return t.cell.Get() }

// Acts has f say whether the daemon acts by what is trusted, for one that takes a while to: trustd then goes on with the replacement of an authority only when it does. The daemon calls Tell
// when that may have changed. Without f it does so at once. f may be called from any goroutine.
func (t *Trust) Acts(f func(*Roots) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.acts = f
}

// Tell has trustd told soon how far the daemon is. It never blocks.
func (t *Trust) Tell() { t.tell() }

func (t *Trust) tell() {
	select {
	case t.told <- struct{}{}:
	default:
	}
}

func (t *Trust) add(l *Leaf) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leaves = append(t.leaves, l)
}

// report tells trustd how far the daemon is, after each change, until ctx is done.
func (t *Trust) report(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.told:
		}
		for pause := firstPause; ; pause = min(2*pause, maxPause) {
			r, ok := t.words()
			if !ok {
				break // it is told again when it acts
			}
			call, cancel := context.WithTimeout(ctx, deadline)
			_, err := t.signer.ReportTrust(call, r)
			cancel()
			if err == nil || ctx.Err() != nil || status.Code(err) == codes.Unimplemented {
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	}
}

// words is what there is to report, and whether there is.
func (t *Trust) words() (*trustv1.ReportTrustRequest, bool) {
	roots, _ := t.cell.Get()
	t.mu.Lock()
	acts, leaves := t.acts, slices.Clone(t.leaves)
	t.mu.Unlock()
	r := &trustv1.ReportTrustRequest{Authorities: roots.State.GetAuthorities()}
	for _, l := range leaves {
		if p, _ := l.Pair(); p != nil {
			if stale(p, roots, time.Now()) {
				return nil, false // another one is on its way
			}
			sum := sha256.Sum256(p.CA)
			r.Held = append(r.Held, &trustv1.HeldCertificate{Profile: l.cfg.Profile, Authority: hex.EncodeToString(sum[:])})
		}
	}
	return r, roots.Known && (acts == nil || acts(roots))
}

// Run follows until ctx is done; it returns ctx's error. It survives restarts of trustd.
func (t *Trust) Run(ctx context.Context) error {
	var reporter sync.WaitGroup
	reporter.Go(func() { t.report(ctx) })
	defer reporter.Wait()
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
	t.tell()
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
