// Package testissuer is a small OpenID Connect issuer for tests: real TLS, real signatures, the flows that bhctl uses (RFC 6749 with RFC 7636, RFC 8628).
//
// It is for tests only. Whoever asks is let in as User; there is one public client.
package testissuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Issuer is one issuer. Make it with New; its methods are safe for concurrent use.
type Issuer struct {
	URL      string
	CA       string // PEM
	ClientID string
	// User and Groups are who signs in; Life is that of ID tokens. Set them before they are needed.
	User   string
	Groups []string
	Life   time.Duration

	t      testing.TB
	server *httptest.Server

	mu      sync.Mutex
	keys    map[string]crypto.Signer // guarded by mu
	current string                   // guarded by mu; id of the key that signs
	down    string                   // guarded by mu; "": it answers
	hung    chan struct{}            // closed at the end of the test
	asked   map[string]int           // guarded by mu; by path
	codes   map[string]url.Values    // guarded by mu; by code: the request that asked for it
	devices map[string]*device       // guarded by mu; by device code
	refresh map[string]bool          // guarded by mu
}

type device struct {
	user     string // what the person types
	approved bool
}

// New starts an issuer that ends with the test.
func New(t testing.TB) *Issuer {
	i := &Issuer{ClientID: "bulkhead", User: "ann@example.org", Life: time.Hour, t: t, keys: map[string]crypto.Signer{}, hung: make(chan struct{}),
		asked: map[string]int{}, codes: map[string]url.Values{}, devices: map[string]*device{}, refresh: map[string]bool{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", i.discovery)
	mux.HandleFunc("/keys", i.jwks)
	mux.HandleFunc("/authorize", i.authorize)
	mux.HandleFunc("/device", i.device)
	mux.HandleFunc("/token", i.token)
	i.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.asked[r.URL.Path]++
		down := i.down
		i.mu.Unlock()
		switch down {
		case "hangs":
			select {
			case <-i.hung:
			case <-r.Context().Done():
			}
		case "fails":
			http.Error(w, "out of order", http.StatusServiceUnavailable)
		default:
			mux.ServeHTTP(w, r)
		}
	}))
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0) // tests want to be distrusted
	i.server.StartTLS()
	t.Cleanup(func() { close(i.hung); i.server.Close() })
	i.URL = i.server.URL
	i.CA = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.server.Certificate().Raw}))
	i.Rotate("k1", false)
	return i
}

// Down makes the issuer answer with errors ("fails"), not at all ("hangs"), or again ("").
func (i *Issuer) Down(how string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.down = how
}

// Asked returns how often a path was asked for.
func (i *Issuer) Asked(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[path]
}

// Rotate makes a new key, RSA or P-256, and forgets the others if alone.
func (i *Issuer) Rotate(id string, alone bool) {
	var key crypto.Signer
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if strings.HasPrefix(id, "rsa") {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		i.t.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if alone {
		clear(i.keys)
	}
	i.keys[id], i.current = key, id
}

// Token signs an ID token of User, with these claims instead of what it would have; a nil one is left out.
func (i *Issuer) Token(claims map[string]any) string {
	all := jwt.MapClaims{"iss": i.URL, "aud": i.ClientID, "sub": "4711", "email": i.User, "email_verified": true, "groups": i.Groups, "iat": time.Now().Unix(), "exp": time.Now().Add(i.Life).Unix()}
	maps.Copy(all, claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	i.mu.Lock()
	defer i.mu.Unlock()
	var method jwt.SigningMethod = jwt.SigningMethodES256
	if _, ok := i.keys[i.current].(*rsa.PrivateKey); ok {
		method = jwt.SigningMethodRS256
	}
	t := jwt.NewWithClaims(method, all)
	t.Header["kid"] = i.current
	text, err := t.SignedString(i.keys[i.current])
	if err != nil {
		i.t.Error(err)
	}
	return text
}

// Approve is the person who types the code of a device; it reports whether there is such a code.
func (i *Issuer) Approve(user string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, d := range i.devices {
		if d.user == user {
			d.approved = true
			return true
		}
	}
	return false
}

// Forget makes every refresh token void.
func (i *Issuer) Forget() {
	i.mu.Lock()
	defer i.mu.Unlock()
	clear(i.refresh)
}

func (i *Issuer) discovery(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, map[string]any{
		"issuer": i.URL, "jwks_uri": i.URL + "/keys", "authorization_endpoint": i.URL + "/authorize", "token_endpoint": i.URL + "/token",
		"device_authorization_endpoint": i.URL + "/device", "scopes_supported": []string{"openid", "email", "groups", "offline_access"},
		"authorization_response_iss_parameter_supported": true, "code_challenge_methods_supported": []string{"S256"},
	})
}

func (i *Issuer) jwks(w http.ResponseWriter, _ *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	b64 := base64.RawURLEncoding.EncodeToString
	var keys []map[string]any
	for _, id := range slices.Sorted(maps.Keys(i.keys)) {
		switch k := i.keys[id].Public().(type) {
		case *ecdsa.PublicKey:
			raw, err := k.Bytes()
			if err != nil {
				i.t.Error(err)
			}
			keys = append(keys, map[string]any{"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": id, "x": b64(raw[1:33]), "y": b64(raw[33:])})
		case *rsa.PublicKey:
			keys = append(keys, map[string]any{"kty": "RSA", "use": "sig", "kid": id, "n": b64(k.N.Bytes()), "e": b64(big.NewInt(int64(k.E)).Bytes())})
		}
	}
	answer(w, http.StatusOK, map[string]any{"keys": keys})
}

// authorize lets the person in at once and sends the browser back (RFC 6749 section 4.1.2, RFC 9207).
func (i *Issuer) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	back, err := url.Parse(q.Get("redirect_uri"))
	if err != nil || back.Hostname() != "127.0.0.1" || q.Get("client_id") != i.ClientID || q.Get("response_type") != "code" || q.Get("code_challenge_method") != "S256" {
		http.Error(w, "a request that no issuer would take: "+r.URL.RawQuery, http.StatusBadRequest)
		return
	}
	code := rand.Text()
	i.mu.Lock()
	i.codes[code] = q
	i.mu.Unlock()
	back.RawQuery = url.Values{"code": {code}, "state": {q.Get("state")}, "iss": {i.URL}}.Encode()
	http.Redirect(w, r, back.String(), http.StatusFound)
}

func (i *Issuer) device(w http.ResponseWriter, r *http.Request) {
	if r.PostFormValue("client_id") != i.ClientID {
		fail(w, "invalid_client")
		return
	}
	d, code := &device{user: rand.Text()[:8]}, rand.Text()
	i.mu.Lock()
	i.devices[code] = d
	i.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"device_code": code, "user_code": d.user, "verification_uri": i.URL + "/activate", "expires_in": 60, "interval": 1})
}

func (i *Issuer) token(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	nonce, refusal := i.grant(r)
	i.mu.Unlock()
	if refusal != "" {
		fail(w, refusal)
		return
	}
	claims := map[string]any{}
	if nonce != "" {
		claims["nonce"] = nonce
	}
	next := rand.Text()
	i.mu.Lock()
	i.refresh[next] = true
	i.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"access_token": rand.Text(), "token_type": "Bearer", "expires_in": int(i.Life.Seconds()), "refresh_token": next, "id_token": i.Token(claims)})
}

// grant decides about one request for a token. Codes and refresh tokens are good once. The caller holds i.mu.
func (i *Issuer) grant(r *http.Request) (nonce, refusal string) {
	switch r.PostFormValue("grant_type") {
	case "authorization_code":
		code := r.PostFormValue("code")
		q, ok := i.codes[code]
		delete(i.codes, code)
		sum := sha256.Sum256([]byte(r.PostFormValue("code_verifier")))
		if !ok || base64.RawURLEncoding.EncodeToString(sum[:]) != q.Get("code_challenge") || r.PostFormValue("redirect_uri") != q.Get("redirect_uri") {
			return "", "invalid_grant"
		}
		return q.Get("nonce"), ""
	case "refresh_token":
		if old := r.PostFormValue("refresh_token"); !i.refresh[old] {
			return "", "invalid_grant"
		} else {
			delete(i.refresh, old)
		}
		return "", ""
	case "urn:ietf:params:oauth:grant-type:device_code":
		d := i.devices[r.PostFormValue("device_code")]
		switch {
		case d == nil:
			return "", "invalid_grant"
		case !d.approved:
			return "", "authorization_pending"
		}
		delete(i.devices, r.PostFormValue("device_code"))
		return "", ""
	}
	return "", "unsupported_grant_type"
}

func fail(w http.ResponseWriter, code string) {
	answer(w, http.StatusBadRequest, map[string]any{"error": code})
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v)
}
