package balance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// probeAll has one goroutine for each backend that there is.
func (b *Balancer) probeAll(ctx context.Context) error {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		b.mu.Lock()
		t := b.targets
		cfg, err := t.config()
		for _, k := range b.backends {
			if k.stop != nil {
				k.stop() // it goes on below, with the new roots
			}
			if err != nil || cfg == nil {
				continue
			}
			pctx, stop := context.WithCancel(ctx)
			k.stop = stop
			all.Go(func() {
				defer stop()
				b.probeOne(pctx, k, cfg)
			})
		}
		b.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.wake:
		}
	}
}

// probeOne asks one backend until ctx is done, over one connection as long as that is good: a handshake each second by every node would be most of what a large cluster's
// API servers do. Now and then it begins a new one, as a new client would.
func (b *Balancer) probeOne(ctx context.Context, k *backend, cfg *tls.Config) {
	cfg = cfg.Clone()
	cfg.ServerName = k.address.Addr().String()
	tr := &http.Transport{DialContext: b.dialer.DialContext, TLSClientConfig: cfg, MaxIdleConnsPerHost: 1, MaxResponseHeaderBytes: maxAnswer}
	defer tr.CloseIdleConnections()
	fresh := time.Now()
	for {
		start := time.Now()
		if start.Sub(fresh) >= freshPeriod {
			tr.CloseIdleConnections()
			fresh = start
		}
		answered, err := probe(ctx, k.address, tr)
		if ctx.Err() != nil {
			return
		}
		next := period
		if err == nil {
			b.good(k)
		} else if b.bad(k, err, !answered, 1); b.doubted(k) {
			next = retryPause
		}
		if !pause(ctx, next-time.Since(start)) {
			return
		}
	}
}

// doubted reports whether a backend is up, though its last probe failed: the next one decides, soon.
func (b *Balancer) doubted(k *backend) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return k.up
}

// maxAnswer is bytes of an answer to /readyz; it lists the checks that failed.
const maxAnswer = 16 << 10

// probe asks one backend once whether it is ready. answered is false if it said nothing that can be trusted.
func probe(ctx context.Context, address netip.AddrPort, tr *http.Transport) (answered bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer within %s", probeTimeout))
	defer cancel()
	defer func() {
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = context.Cause(ctx)
		}
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address.String()+"/readyz", nil)
	if err != nil {
		return false, err
	}
	answer, err := tr.RoundTrip(req)
	if err != nil {
		return false, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer)) // all of it, or the connection could not be used again
	if err != nil {
		return false, fmt.Errorf("GET /readyz: %w", err)
	}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusUnauthorized, http.StatusForbidden: // it lives, and does not tell us more
		return true, nil
	}
	return true, fmt.Errorf("GET /readyz: %s%s", answer.Status, Unready(body))
}

// maxChecks is how many of the checks that failed are named: more would push what else is said off the line.
const maxChecks = 4

// Unready names the checks that failed in the body of an API server's answer to /readyz, as `: "etcd", "informer-sync" failed`. It is "" where there are none: other
// bodies have no such lines. It is pure. See https://kubernetes.io/docs/reference/using-api/health-checks/.
func Unready(body []byte) string {
	var failed []string
	for line := range strings.Lines(string(body)) {
		if check, ok := strings.CutPrefix(line, "[-]"); ok {
			name, _, _ := strings.Cut(strings.TrimSpace(check), " ")
			failed = append(failed, fmt.Sprintf("%.64q", name))
		}
	}
	switch n := len(failed); {
	case n == 0:
		return ""
	case n > maxChecks:
		return fmt.Sprintf(": %s and %d more failed", strings.Join(failed[:maxChecks], ", "), n-maxChecks)
	}
	return ": " + strings.Join(failed, ", ") + " failed"
}

// pool reads PEM certificates; anything else in there is an error.
func pool(roots string) (*x509.CertPool, error) {
	p := x509.NewCertPool()
	rest := []byte(roots)
	n := 0
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		p.AddCert(c)
		n++
	}
	if n == 0 {
		return nil, errors.New("no certificate in PEM form")
	}
	return p, nil
}
