package apid

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	// fetchTime bounds one look at the issuer: its configuration and its keys together.
	fetchTime = 10 * time.Second
	// A look is taken every keysEvery, soonAfter one that failed, and for keys that are not known; but never twice within keysPause.
	keysEvery = time.Hour
	soonAfter = time.Minute
	keysPause = 10 * time.Second
	// maxAnswer bounds each answer of the issuer, in bytes; maxWaiting the calls that wait for its keys at once.
	maxAnswer  = 1 << 20
	maxWaiting = 64
)

// issuer is an OpenID Connect issuer and what is known of it. Its keys are good as long as no newer ones were read: an issuer that does not answer
// stops nobody whose token is signed with one of them. Only callers whose token is signed with another one wait for it.
type issuer struct {
	config config.OIDC
	client *http.Client
	wake   chan struct{} // of size 1: somebody waits for keys

	mu      sync.Mutex
	keys    *keySet       // guarded by mu; nil: none were read yet
	tried   time.Time     // guarded by mu; the last look
	failed  error         // guarded by mu; why it was in vain
	looking bool          // guarded by mu
	looked  chan struct{} // guarded by mu; closed after the next look
	waiting int           // guarded by mu
	good    goodTokens    // guarded by mu
}

// newIssuer opens nothing yet.
func newIssuer(o config.OIDC) *issuer {
	i := &issuer{config: o, wake: make(chan struct{}, 1), looked: make(chan struct{})}
	var roots *x509.CertPool // nil: those of the image
	if o.CA != "" {
		roots = x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(o.CA))
	}
	i.client = &http.Client{
		Timeout: fetchTime,
		// A connection an hour is not kept open. There is no proxy but what the network does.
		Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if r.URL.Scheme != "https" || len(via) > 3 {
				return fmt.Errorf("redirected to %s; allowed are three redirects, to https", r.URL.Redacted())
			}
			return nil
		},
	}
	return i
}

// followIssuer looks at the issuer that the document names, if it names one.
func (d *Daemon) followIssuer(ctx context.Context) error {
	said := ""
	for {
		s, changed := d.spec.Get()
		var i *issuer
		if s.grants != nil {
			i = s.grants.issuer
		}
		if i == nil { // nothing is made, and nothing waits but this
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
			}
			continue
		}
		timer := time.NewTimer(i.due())
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-changed:
			timer.Stop()
			continue
		case <-i.wake:
			timer.Stop()
			if i.recent(d.cfg.Now()) { // who asked came during the look that has ended, and has been told
				continue
			}
		case <-timer.C:
		}
		text := ""
		if err := i.look(ctx, d.cfg.Now); err != nil {
			text = err.Error()
			d.count.issuerFailed.Add(1)
		} else {
			d.count.issuerRead.Set(float64(d.cfg.Now().Unix()))
		}
		if text != "" && text != said {
			d.log.Warn("issuer not read", "service", i.config.Issuer, "err", text)
			daemon.Tell(d.log, daemon.EventAccess, "issuer: "+text, fmt.Sprintf("nobody can sign in whose issuer's keys are not known here yet: %s: %s; certificates and tokens of the cluster work", i.config.Issuer, text))
		} else if text == "" && said != "" {
			daemon.Tell(d.log, daemon.EventAccess, "issuer is back: "+said, fmt.Sprintf("the issuer %s answers again", i.config.Issuer))
		}
		said = text
	}
}

// recent reports whether it is too early for another look.
func (i *issuer) recent(now time.Time) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.justTried(now)
}

// justTried is recent. The caller holds i.mu.
func (i *issuer) justTried(now time.Time) bool {
	return !i.tried.IsZero() && now.Sub(i.tried).Abs() < keysPause
}

// due is how long there is until the next look that nobody asks for.
func (i *issuer) due() time.Duration {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.tried.IsZero():
		return 0
	case i.failed != nil:
		return soonAfter
	}
	return keysEvery
}

// look reads the issuer's keys, and tells those who wait.
func (i *issuer) look(ctx context.Context, now func() time.Time) error {
	i.mu.Lock()
	i.looking = true
	i.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	keys, err := i.read(ctx)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.looking, i.tried, i.failed = false, now(), err
	if err == nil {
		i.keys = keys
		i.good = nil // some may have been signed with a key that is gone
	}
	close(i.looked)
	i.looked = make(chan struct{})
	return err
}

// read asks for the issuer's configuration (OpenID Connect Discovery 1.0 section 4) and its keys.
func (i *issuer) read(ctx context.Context) (*keySet, error) {
	var about struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	raw, err := i.get(ctx, strings.TrimSuffix(i.config.Issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, &about); err != nil {
		return nil, fmt.Errorf("its configuration is not JSON: %w", err)
	}
	if about.Issuer != i.config.Issuer {
		return nil, fmt.Errorf("it calls itself %.200q, which must be what the document says, letter by letter", about.Issuer)
	}
	if u, err := url.Parse(about.Keys); err != nil || u.Scheme != "https" {
		return nil, fmt.Errorf("its jwks_uri is %.200q; allowed is an https URL", about.Keys)
	}
	if raw, err = i.get(ctx, about.Keys); err != nil {
		return nil, err
	}
	return parseKeys(raw)
}

func (i *issuer) get(ctx context.Context, from string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, err
	}
	resp, err := i.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: %s", from, resp.Status)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(raw) > maxAnswer {
		err = fmt.Errorf("more than %d bytes", maxAnswer)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", from, err)
	}
	return raw, nil
}

// key returns the key with which a token is signed. If it is not known, the issuer is asked, which takes fetchTime at most.
func (i *issuer) key(ctx context.Context, kid, alg string, now func() time.Time) (any, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if k := i.keys.find(kid, alg); k != nil {
		return k, nil
	}
	if !i.looking && i.justTried(now()) {
		return nil, i.unknown(kid, now())
	}
	if i.waiting >= maxWaiting {
		return nil, errs.New(errs.Exhausted, "%d calls wait for the keys of issuer %s already; try again", maxWaiting, i.config.Issuer)
	}
	i.waiting++
	looked := i.looked
	i.mu.Unlock()
	select {
	case i.wake <- struct{}{}:
	default: // it has been asked for
	}
	limit := time.NewTimer(fetchTime + keysPause) // what went on when this came, and the next
	select {
	case <-looked:
	case <-limit.C:
	case <-ctx.Done():
	}
	limit.Stop()
	i.mu.Lock()
	i.waiting--
	if k := i.keys.find(kid, alg); k != nil {
		return k, nil
	}
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return nil, i.unknown(kid, now())
}

// unknown says why a key is not known. The caller holds i.mu.
func (i *issuer) unknown(kid string, now time.Time) error {
	ago := now.Sub(i.tried).Round(time.Second)
	if i.failed != nil {
		text := i.failed.Error()
		var u *url.Error
		if errors.As(i.failed, &u) {
			text = u.URL + ": " + u.Err.Error()
		}
		return badToken(i.config, "it is signed with key %.64q, which is not known here, and the issuer cannot be asked (%s; tried %s ago); certificates and tokens of the cluster work", kid, text, ago)
	}
	return badToken(i.config, "it is signed with key %.64q, which is none of the issuer's (read %s ago); sign in again", kid, ago)
}
