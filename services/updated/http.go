package updated

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Limits of one request.
const (
	maxRedirects  = 5
	answerTime    = 30 * time.Second
	connectTime   = 10 * time.Second
	maxErrorText  = 512      // bytes of a server's own words that are shown
	maxHeaderSize = 64 << 10 // bytes
)

// newClient returns a client that trusts the public authorities, or only those of ca (PEM). It speaks HTTP/1.1: one connection at a time
// needs no more, and its memory is bounded.
func newClient(ca string) (*http.Client, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return nil, errs.New(errs.Invalid, "ca: no certificate in PEM form")
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: connectTime}).DialContext, TLSHandshakeTimeout: connectTime, ResponseHeaderTimeout: answerTime,
			TLSClientConfig: cfg, DisableCompression: true, MaxIdleConns: 2, IdleConnTimeout: answerTime, MaxResponseHeaderBytes: maxHeaderSize,
			TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return errs.New(errs.Precondition, "more than %d redirects", maxRedirects)
			}
			return checkURL(r.URL)
		},
	}, nil
}

// checkURL takes https only. What is signed could as well come in the clear, but who reads along would learn what the node runs.
func checkURL(u *url.URL) error {
	if u.Scheme == "https" || u.Scheme == "http" && isLoopback(u.Hostname()) {
		return nil
	}
	return errs.New(errs.Invalid, "%.200q: want an https URL", u.Redacted())
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// do makes a request. A transport error is Unavailable, unless trying again cannot help.
func do(c *http.Client, r *http.Request) (*http.Response, error) {
	resp, err := c.Do(r)
	if err == nil {
		return resp, nil
	}
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var cert x509.CertificateInvalidError
	kind := errs.Unavailable
	switch {
	case errors.As(err, &unknown), errors.As(err, &host), errors.As(err, &cert):
		kind = errs.Precondition
	case errs.Is(err, errs.Precondition), errs.Is(err, errs.Invalid):
		kind = errs.Of(err)
	}
	if text := err.Error(); len(text) > 2*maxLine { // it shows what a server sent, a header for one, in a length that is not the server's to choose; the end says what is wrong
		return nil, errs.New(kind, "%s", strings.ToValidUTF8(text[:maxLine]+" … "+text[len(text)-maxLine:], ""))
	}
	return nil, errs.New(kind, "%w", err)
}

// refused makes an error of an answer that is not what was asked for, and closes it.
func refused(resp *http.Response) error {
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorText)) // for people
	kind := errs.Precondition
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound:
		kind = errs.NotFound
	case code >= 500, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout:
		kind = errs.Unavailable
	}
	line, _, _ := strings.Cut(strings.ToValidUTF8(string(bytes.TrimSpace(text)), "?"), "\n")
	if line != "" {
		line = fmt.Sprintf(" (%.200q)", line)
	}
	return errs.New(kind, "%s answers %s%s", resp.Request.URL.Redacted(), resp.Status, line)
}

// get asks for a resource from offset on, for length bytes. A server that does not know ranges sends all of it: then skip is offset.
func get(c *http.Client, r *http.Request, offset, length int64) (body io.ReadCloser, skip int64, err error) {
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	resp, err := do(c, r)
	if err != nil {
		return nil, 0, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if from, _, ok := contentRange(resp.Header.Get("Content-Range")); !ok || from != offset {
			resp.Body.Close()
			return nil, 0, errs.New(errs.Unavailable, "%s answers with range %.60q, asked for bytes from %d on", r.URL.Redacted(), resp.Header.Get("Content-Range"), offset)
		}
		return resp.Body, 0, nil
	case http.StatusOK:
		return resp.Body, offset, nil
	case http.StatusRequestedRangeNotSatisfiable:
		resp.Body.Close()
		return nil, 0, errs.New(errs.Precondition, "%s ends before byte %d: it is cut off, or not the file that the manifest describes", r.URL.Redacted(), offset)
	}
	return nil, 0, refused(resp)
}

// contentRange reads "bytes 0-99/200"; the total is -1 if the server does not say it.
func contentRange(s string) (from, total int64, ok bool) {
	rest, ok := strings.CutPrefix(s, "bytes ")
	span, all, ok2 := strings.Cut(rest, "/")
	first, _, ok3 := strings.Cut(span, "-")
	from, err := strconv.ParseInt(first, 10, 64)
	if !ok || !ok2 || !ok3 || err != nil || from < 0 {
		return 0, 0, false
	}
	if total, err = strconv.ParseInt(all, 10, 64); err != nil || total < 0 {
		total = -1
	}
	return from, total, true
}

// A web is a bundle behind a URL.
type web struct {
	client *http.Client
	url    *url.URL
	ranges bool
}

func newWeb(text, ca string) (*web, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" {
		return nil, errs.New(errs.Invalid, "%.200q is no URL", text)
	}
	if err := checkURL(u); err != nil {
		return nil, err
	}
	c, err := newClient(ca)
	return &web{client: c, url: u}, err
}

func (w *web) String() string { return w.url.Redacted() }

func (w *web) request(ctx context.Context) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url.String(), nil)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	return r, nil
}

func (w *web) head(ctx context.Context) (manifest, signature []byte, err error) {
	r, err := w.request(ctx)
	if err != nil {
		return nil, nil, err
	}
	resp, err := do(w.client, r)
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, nil, refused(resp)
	}
	defer resp.Body.Close()
	w.ranges = resp.Header.Get("Accept-Ranges") == "bytes"
	manifest, signature, err = bundle.ReadHead(io.LimitReader(resp.Body, bundle.HeadSize(bundle.MaxManifest)+512))
	return manifest, signature, headError(err)
}

// headError tells a bundle that is none from a connection that is none.
func headError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bundle.ErrNotBundle), errors.Is(err, bundle.ErrUnsigned):
		return errs.New(errs.Invalid, "%w", err)
	}
	return errs.New(errs.Unavailable, "%w", err)
}

func (w *web) pieces(context.Context) bool { return w.ranges }

func (w *web) open(ctx context.Context, h bundle.Head, file int, offset, length int64) (io.ReadCloser, int64, error) {
	r, err := w.request(ctx)
	if err != nil {
		return nil, 0, err
	}
	return get(w.client, r, h.Offsets()[file]+offset, length)
}
