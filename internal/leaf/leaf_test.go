package leaf

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// signer is a trustd of a few lines.
type signer struct {
	trustv1.SignerClient
	mu    sync.Mutex
	ca    string // guarded by mu, as all below
	fail  error
	calls int
}

func (s *signer) set(ca string, fail error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca, s.fail = ca, fail
}

func (s *signer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

func (s *signer) SignCertificate(_ context.Context, r *trustv1.SignCertificateRequest, _ ...grpc.CallOption) (*trustv1.SignCertificateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if s.fail != nil {
		return nil, s.fail
	}
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(int64(s.calls)), Subject: pkix.Name{CommonName: r.GetProfile()},
		NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(24 * time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, csr.PublicKey, key)
	return &trustv1.SignCertificateResponse{Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), Ca: s.ca}, err
}

func TestRenewsAtTwoThirdsAndKeepsOldOneOnFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		s := &signer{ca: "CA1", fail: errs.New(errs.Precondition, "unclaimed")}
		trust := NewTrust(s, log)
		set := metrics.New("apid")
		l := New(Config{Signer: s, Profile: "apid-server", Trust: trust, Log: log, Expiry: NewExpiry(set, "apid")})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()

		synctest.Wait()
		if s.count() != 0 {
			t.Fatalf("%d calls before trustd's first word, want none", s.count())
		}
		trust.cell.Set(&Roots{State: &trustv1.TrustState{}, Known: true})
		synctest.Wait()
		if _, err := l.GetCertificate(nil); err == nil || s.count() != 1 {
			t.Fatalf("before the authority exists: err %v after %d calls, want an error after 1", err, s.count())
		}
		s.set("CA1", nil)
		trust.cell.Set(&Roots{Known: true, State: &trustv1.TrustState{Claimed: true, OsCa: "CA1"}})
		synctest.Wait()
		first, err := l.GetCertificate(&tls.ClientHelloInfo{})
		if err != nil || s.count() != 2 {
			t.Fatalf("an authority appeared: err %v after %d calls, want none after 2", err, s.count())
		}
		time.Sleep(15 * time.Hour) // two thirds of 24 h 5 min, less the 5 minutes that are over, are 15 h 58 min
		synctest.Wait()
		if s.count() != 2 {
			t.Errorf("after 15 h: %d calls, want 2", s.count())
		}
		s.set("CA1", errors.New("broken"))
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if now, err := l.GetCertificate(nil); err != nil || now != first {
			t.Errorf("failed renewal: the old certificate is gone (%v)", err)
		}
		if n := s.count(); n < 3 || n > 500 {
			t.Errorf("%d calls after an hour of failures, want some but not a storm", n)
		}
		s.set("CA1", nil)
		time.Sleep(maxPause)
		synctest.Wait()
		second, _ := l.GetCertificate(nil)
		if second == first {
			t.Error("not renewed after trustd works again")
		}
		for _, f := range set.Families() {
			if f.GetName() == "bulkhead_apid_certificate_expiry_timestamp_seconds" && (len(f.GetSamples()) != 1 || f.GetSamples()[0].GetValue() != float64(second.Leaf.NotAfter.Unix()) || f.GetSamples()[0].GetLabels()["profile"] != "apid-server") {
				t.Errorf("figure of the expiry: %v, want that of the newest one, %s", f, second.Leaf.NotAfter)
			}
		}
		s.set("CA2", nil)
		trust.cell.Set(&Roots{Known: true, State: &trustv1.TrustState{Claimed: true, OsCa: "CA2"}})
		synctest.Wait()
		if third, _ := l.GetCertificate(nil); third == second {
			t.Error("not renewed after its authority was replaced")
		}
		third, _ := l.GetCertificate(nil)
		trust.cell.Set(&Roots{Known: true, State: &trustv1.TrustState{Claimed: true, OsCa: "CA2", Names: []string{"node"}}})
		synctest.Wait()
		if fourth, _ := l.GetCertificate(nil); fourth == third {
			t.Error("a server's certificate is not renewed after its names changed")
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// While the cluster's state cannot be read, the nodes are those that were known last; for a node that is somebody else's then they are not.
func TestNodesStay(t *testing.T) {
	trust := NewTrust(&signer{}, slog.New(slog.DiscardHandler))
	for i, c := range []struct {
		state *trustv1.TrustState
		want  int
	}{
		{&trustv1.TrustState{Claimed: true, NodeName: "a", Nodes: []*trustv1.ClusterNode{{Name: "a"}, {Name: "b"}}}, 2},
		{&trustv1.TrustState{Claimed: true, NodeName: "a"}, 2},
		{&trustv1.TrustState{Claimed: true, NodeName: "a", Nodes: []*trustv1.ClusterNode{{Name: "a"}}}, 1},
		{&trustv1.TrustState{Claimed: true, NodeName: "c"}, 0},
		{&trustv1.TrustState{Claimed: true, NodeName: "c", Nodes: []*trustv1.ClusterNode{{Name: "c"}}}, 1},
		{&trustv1.TrustState{}, 0},
	} {
		if err := trust.set(c.state); err != nil {
			t.Fatal(err)
		}
		if r, _ := trust.Roots(); len(r.State.GetNodes()) != c.want {
			t.Errorf("state %d: %d nodes, want %d", i, len(r.State.GetNodes()), c.want)
		}
	}
}
