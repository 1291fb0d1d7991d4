// Package login signs a person in at an OpenID Connect issuer, from a command line: in a browser (authorization code with PKCE on a loopback address,
// RFC 7636 and RFC 8252), or on another device (RFC 8628), and later by a refresh token.
//
// Programs on the operator's side use it. It keeps nothing and prints nothing. What it gets is checked as far as it concerns who asked; whether a
// token is good is the node's to say.
package login

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/oauth2"
)

const (
	// askTime bounds one question to the issuer.
	askTime   = 30 * time.Second
	maxAnswer = 1 << 20 // bytes
)

// Config says where and as what to sign in.
type Config struct {
	// Issuer is its URL, and ClientID what the cluster is called there; both are required. The client is public: it has no secret.
	Issuer, ClientID string
	// CA is PEM; nil means the system's authorities.
	CA []byte
	// Scopes are asked for besides "openid"; nil means email, profile, groups and offline_access, as far as the issuer says that it knows them.
	Scopes []string
}

// Tokens are what a person who signed in has.
type Tokens struct {
	ID      string    // the ID token
	Refresh string    // "" if the issuer gave none
	Expires time.Time // of ID
}

// String keeps secrets out of logs.
func (Tokens) String() string { return "[secret]" }

// GoString does the same for %#v.
func (Tokens) GoString() string { return "[secret]" }

// Issuer is one that has answered. Its methods may be used at the same time.
type Issuer struct {
	config Config
	about  about
	client *http.Client
	oauth  oauth2.Config
}

// about is what is read of the issuer's configuration (OpenID Connect Discovery 1.0, RFC 8414, RFC 8628 section 4, RFC 9207).
type about struct {
	Issuer        string   `json:"issuer"`
	Authorization string   `json:"authorization_endpoint"`
	Token         string   `json:"token_endpoint"`
	Device        string   `json:"device_authorization_endpoint"`
	Scopes        []string `json:"scopes_supported"`
	NamesItself   bool     `json:"authorization_response_iss_parameter_supported"`
}

// Discover asks an issuer for its configuration.
func Discover(ctx context.Context, c Config) (*Issuer, error) {
	u, err := url.Parse(c.Issuer)
	if err != nil || u.Scheme != "https" || u.Host == "" || c.ClientID == "" {
		return nil, fmt.Errorf("issuer: %q with client %q: allowed are an https URL and a client's name", c.Issuer, c.ClientID)
	}
	i := &Issuer{config: c, client: &http.Client{Timeout: askTime}}
	if len(c.CA) > 0 {
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(c.CA) {
			return nil, errors.New("issuer: ca: no PEM certificate in it")
		}
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
		i.client.Transport = t
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.Issuer, "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return nil, err
	}
	resp, err := i.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("issuer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("issuer: get %s: %s", r.URL, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&i.about); err != nil {
		return nil, fmt.Errorf("issuer: its configuration: %w", err)
	}
	if i.about.Issuer != c.Issuer {
		return nil, fmt.Errorf("issuer: %s calls itself %q: use that name, letter by letter", c.Issuer, i.about.Issuer)
	}
	for _, e := range []string{i.about.Authorization, i.about.Token, i.about.Device} {
		if u, err := url.Parse(e); err != nil || e != "" && u.Scheme != "https" {
			return nil, fmt.Errorf("issuer: it sends to %q; allowed are https URLs", e)
		}
	}
	i.oauth = oauth2.Config{ClientID: c.ClientID, Scopes: i.scopes(), Endpoint: oauth2.Endpoint{
		AuthURL: i.about.Authorization, TokenURL: i.about.Token, DeviceAuthURL: i.about.Device, AuthStyle: oauth2.AuthStyleInParams}}
	return i, nil
}

func (i *Issuer) scopes() []string {
	out := []string{"openid"}
	if i.config.Scopes != nil {
		return append(out, i.config.Scopes...)
	}
	for _, s := range []string{"email", "profile", "groups", "offline_access"} {
		if len(i.about.Scopes) == 0 && s != "groups" || slices.Contains(i.about.Scopes, s) {
			out = append(out, s)
		}
	}
	return out
}

// HasDevice reports whether a person can sign in with another device.
func (i *Issuer) HasDevice() bool { return i.about.Device != "" }

// HasBrowser reports whether a person can sign in with a browser on this machine.
func (i *Issuer) HasBrowser() bool { return i.about.Authorization != "" }

func (i *Issuer) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, oauth2.HTTPClient, i.client)
}

// Device signs in with another device: show tells the person the address, the code to type there, and an address that holds the code already ("" if there
// is none). It returns when the person is done, when the code has expired, or when ctx is done.
func (i *Issuer) Device(ctx context.Context, show func(address, code, complete string)) (Tokens, error) {
	if !i.HasDevice() {
		return Tokens{}, fmt.Errorf("issuer %s: it has no sign-in with another device (device_authorization_endpoint); use a browser", i.config.Issuer)
	}
	ctx = i.context(ctx)
	d, err := i.oauth.DeviceAuth(ctx)
	if err != nil {
		return Tokens{}, i.explain(err)
	}
	show(d.VerificationURI, d.UserCode, d.VerificationURIComplete)
	t, err := i.oauth.DeviceAccessToken(ctx, d)
	return i.tokens(t, err, "", "")
}

// Refresh gets new tokens. ErrSignIn means that only the person can.
func (i *Issuer) Refresh(ctx context.Context, refresh string) (Tokens, error) {
	t, err := i.oauth.TokenSource(i.context(ctx), &oauth2.Token{RefreshToken: refresh}).Token()
	return i.tokens(t, err, "", refresh)
}

// ErrSignIn says that the person has to sign in again.
var ErrSignIn = errors.New("sign in again")

// tokens checks what the issuer gave: that it is for this client, and the answer to this request. old is the refresh token that stays good if there is no other.
func (i *Issuer) tokens(t *oauth2.Token, err error, nonce, old string) (Tokens, error) {
	if err != nil {
		return Tokens{}, i.explain(err)
	}
	raw, _ := t.Extra("id_token").(string)
	if raw == "" {
		return Tokens{}, fmt.Errorf("issuer %s: it gave no ID token: %w", i.config.Issuer, ErrSignIn)
	}
	_, rest, _ := strings.Cut(raw, ".")
	payload, _, _ := strings.Cut(rest, ".")
	var claims struct {
		Issuer   string `json:"iss"`
		Nonce    string `json:"nonce"`
		Expires  int64  `json:"exp"`
		Audience any    `json:"aud"`
	}
	data, err := base64.RawURLEncoding.DecodeString(payload)
	if err == nil {
		err = json.Unmarshal(data, &claims)
	}
	if err != nil {
		return Tokens{}, fmt.Errorf("issuer %s: its ID token: %w", i.config.Issuer, err)
	}
	if claims.Issuer != i.config.Issuer || nonce != "" && claims.Nonce != nonce {
		return Tokens{}, fmt.Errorf("issuer %s: its ID token is of %q, or the answer to another request; nothing of it was kept", i.config.Issuer, claims.Issuer)
	}
	out := Tokens{ID: raw, Refresh: t.RefreshToken, Expires: time.Unix(claims.Expires, 0)}
	if out.Refresh == "" {
		out.Refresh = old
	}
	return out, nil
}

// explain puts the issuer's own words (RFC 6749 section 5.2) into an error.
func (i *Issuer) explain(err error) error {
	var e *oauth2.RetrieveError
	if !errors.As(err, &e) {
		return fmt.Errorf("issuer %s: %w", i.config.Issuer, err)
	}
	text := e.ErrorCode
	if e.ErrorDescription != "" {
		text += ": " + e.ErrorDescription
	}
	switch e.ErrorCode {
	case "":
		return fmt.Errorf("issuer %s: %s", i.config.Issuer, e.Response.Status)
	case "invalid_grant", "expired_token", "access_denied":
		return fmt.Errorf("issuer %s: %.500q: %w", i.config.Issuer, text, ErrSignIn)
	}
	return fmt.Errorf("issuer %s: %.500q", i.config.Issuer, text)
}
