package apid

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	maxIDToken = 12 << 10 // bytes; with the other headers it must fit maxHeaders
	maxGroups  = 256
)

// algorithms are those of ID tokens. HMAC is none: its key would be the client's secret, and a public key's bytes must never pass for it.
var algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

// goodTokens remembers ID tokens whose signature and claims were checked, by their digest.
type goodTokens map[[sha256.Size]byte]identity

// badToken is what the holder of an ID token learns. The issuer and the client are public: GetIssuer tells them to everybody.
func badToken(o config.OIDC, format string, args ...any) error {
	return errs.New(errs.Unauthenticated, "your ID token of %s is refused: %s", o.Issuer, fmt.Sprintf(format, args...))
}

// said is what a token says of itself, before anything is checked.
type said struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
	iss string
}

// peek reads a token (RFC 7515 section 7.1) without believing it.
func peek(text string) (s said, ok bool) {
	header, rest, _ := strings.Cut(text, ".")
	payload, _, found := strings.Cut(rest, ".")
	if !found || len(text) > maxIDToken {
		return s, false
	}
	var claims struct {
		Iss string `json:"iss"`
	}
	for part, into := range map[string]any{header: &s, payload: &claims} {
		raw, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil || json.Unmarshal(raw, into) != nil {
			return s, false
		}
	}
	s.iss = claims.Iss
	return s, true
}

// takes reports whether a token is the issuer's to vouch for, and not one of the cluster's own. Only what says it is from elsewhere is.
func (g *grants) takes(text string) bool {
	if g == nil || g.issuer == nil {
		return false
	}
	if g.issuer.remembers(text) {
		return true
	}
	s, ok := peek(text)
	return ok && s.iss != tokenIssuer && s.iss != ""
}

func (i *issuer) remembers(text string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	_, ok := i.good[sha256.Sum256([]byte(text))]
	return ok
}

// who returns the identity in an ID token. Its roles are grants.resolve's to find. The signature is checked once, the time and whether it was revoked always.
func (i *issuer) who(ctx context.Context, text string, trust *trustv1.TrustState, now func() time.Time) (identity, error) {
	sum := sha256.Sum256([]byte(text))
	i.mu.Lock()
	id, ok := i.good[sum]
	keys := i.keys
	i.mu.Unlock()
	if !ok || !now().Before(id.expires) {
		s, ok := peek(text)
		if !ok {
			return identity{}, errStranger
		}
		if err := plausible(s, i.config); err != nil {
			return identity{}, err
		}
		key, err := i.key(ctx, s.Kid, s.Alg, now)
		if err != nil {
			return identity{}, err
		}
		if id, err = fromIDToken(text, s, key, i.config, now()); err != nil {
			return identity{}, err
		}
		id.id = hex.EncodeToString(sum[:16])
		i.mu.Lock()
		if len(i.good) >= maxTokens {
			i.good = nil
		}
		if i.good == nil {
			i.good = goodTokens{}
		}
		if keys == i.keys || keys == nil {
			i.good[sum] = id
		}
		i.mu.Unlock()
	}
	return id, admit(id, trust)
}

// plausible refuses what no key could make good. It is pure.
func plausible(s said, o config.OIDC) error {
	switch {
	case s.iss != o.Issuer:
		return errs.New(errs.Unauthenticated, "your token is of %.200q; this cluster takes ID tokens of %s: bhctl login", s.iss, o.Issuer)
	case !slices.Contains(algorithms, s.Alg):
		return badToken(o, "it is signed with %.32q; allowed are %s", s.Alg, strings.Join(algorithms, ", "))
	case s.Typ != "" && !strings.EqualFold(s.Typ, "JWT"): // an access token (RFC 9068) or a logout token is for others
		return badToken(o, "it is of type %.32q and no ID token", s.Typ)
	}
	return nil
}

// fromIDToken checks a token (OpenID Connect Core 1.0 section 3.1.3.7). It is pure.
func fromIDToken(text string, s said, key any, o config.OIDC, now time.Time) (identity, error) {
	claims := jwt.MapClaims{}
	p := jwt.NewParser(jwt.WithValidMethods([]string{s.Alg}), jwt.WithExpirationRequired(), jwt.WithLeeway(tokenLeeway), jwt.WithTimeFunc(func() time.Time { return now }))
	_, err := p.ParseWithClaims(text, claims, func(*jwt.Token) (any, error) { return key, nil })
	clock := now.UTC().Format(time.RFC3339)
	when := func(name string) string {
		f, _ := claims[name].(float64) // the parser has checked it
		return time.Unix(int64(f), 0).UTC().Format(time.RFC3339)
	}
	switch {
	case errors.Is(err, jwt.ErrTokenSignatureInvalid), errors.Is(err, jwt.ErrTokenUnverifiable), errors.Is(err, jwt.ErrTokenMalformed):
		return identity{}, badToken(o, "its signature is not the issuer's")
	case errors.Is(err, jwt.ErrTokenExpired):
		return identity{}, badToken(o, "it expired at %s, and this node's clock says %s; sign in again: bhctl login", when("exp"), clock)
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		return identity{}, badToken(o, "it is not valid before %s, and this node's clock says %s", when("nbf"), clock)
	case err != nil:
		return identity{}, badToken(o, "%v", err)
	}
	audience, err := claims.GetAudience()
	if err != nil || !slices.Contains(audience, o.Audience) {
		return identity{}, badToken(o, "it is for %.100q (aud) and not for %q", []string(audience), o.Audience)
	}
	azp, has := claims["azp"]
	switch {
	case has && azp != o.ClientID:
		return identity{}, badToken(o, "it was given to client %.100q (azp) and not to %q", fmt.Sprint(azp), o.ClientID)
	case !has && len(audience) > 1:
		return identity{}, badToken(o, "it is for several (aud), and does not say to whom it was given (azp)")
	}
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return identity{}, badToken(o, "it does not say when it expires")
	}
	id := identity{how: howIssuer, expires: expires.Time}
	id.name, id.groups, err = subject(claims, o)
	return id, err
}

// subject maps claims to a name and to groups. It is pure.
func subject(claims jwt.MapClaims, o config.OIDC) (name string, groups []string, err error) {
	name, _ = claims[o.UsernameClaim].(string)
	if !nameable(name) {
		return "", nil, badToken(o, "its claim %q, which is to be the person's name, is %.100q; allowed are 1 to 256 printable characters of ASCII", o.UsernameClaim, fmt.Sprint(claims[o.UsernameClaim]))
	}
	if verified, has := claims["email_verified"]; o.UsernameClaim == "email" && has && verified != true {
		return "", nil, badToken(o, "the issuer has not verified that %q is the person's address (email_verified)", name)
	}
	switch g := claims[o.GroupsClaim].(type) {
	case nil:
	case string:
		groups = []string{o.GroupsPrefix + g}
	case []any:
		if len(g) > maxGroups {
			return "", nil, badToken(o, "it names %d groups; allowed are %d", len(g), maxGroups)
		}
		for _, v := range g {
			if s, ok := v.(string); ok && nameable(s) { // others can be in no binding
				groups = append(groups, o.GroupsPrefix+s)
			}
		}
	default:
		return "", nil, badToken(o, "its claim %q, which is to be the person's groups, is neither a text nor a list of texts", o.GroupsClaim)
	}
	return o.UsernamePrefix + name, groups, nil
}

// nameable: what can stand in metadata and in a log.
func nameable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return s != "" && len(s) <= 256 && strings.TrimSpace(s) == s
}
