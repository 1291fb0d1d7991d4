package issuer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/login"
)

// store is the example's, with one public client that may use every flow.
type store struct{ *storage.Storage }

func (s store) GetClientByClientID(ctx context.Context, id string) (op.Client, error) {
	c, err := s.Storage.GetClientByClientID(ctx, id)
	if own, ok := c.(*storage.Client); ok {
		return native{own}, err
	}
	return c, err
}

// CompleteDeviceAuthorization puts right what the example gets wrong: it takes the name that was typed for the id of the user.
func (s store) CompleteDeviceAuthorization(ctx context.Context, code, _ string) error {
	return s.Storage.CompleteDeviceAuthorization(ctx, code, "id2")
}

type native struct{ *storage.Client }

func (native) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeCode, oidc.GrantTypeRefreshToken, oidc.GrantTypeDeviceCode}
}

// idp is a running issuer, and a person's browser.
type idp struct {
	t       *testing.T
	url, ca string
	browser *http.Client
}

func newIDP(t *testing.T) *idp {
	storage.RegisterClients(storage.NativeClient("bulkhead", "http://127.0.0.1/callback"))
	var handler http.Handler
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	t.Cleanup(s.Close)
	handler = exampleop.SetupServer(s.URL, store{storage.NewStorage(storage.NewUserStore(s.URL))}, slog.New(slog.DiscardHandler), false)
	i := &idp{t: t, url: s.URL, ca: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})), browser: s.Client()}
	var err error
	if i.browser.Jar, err = cookiejar.New(nil); err != nil {
		t.Fatal(err)
	}
	return i
}

// do makes one request of the browser and returns the page.
func (i *idp) do(resp *http.Response, err error) (*url.URL, string) {
	i.t.Helper()
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		i.t.Fatalf("%s: %s, %v: %s", resp.Request.URL, resp.Status, err, page)
	}
	return resp.Request.URL, string(page)
}

// browse is the person: they type a name and a password.
func (i *idp) browse(address string) error {
	at, _ := i.do(i.browser.Get(address))
	_, page := i.do(i.browser.PostForm(i.url+"/login/username", url.Values{"username": {"test-user@127.0.0.1"}, "password": {"verysecure"}, "id": {at.Query().Get("authRequestID")}}))
	if !strings.Contains(page, "You are signed in") {
		return fmt.Errorf("the browser ended with %s", page)
	}
	return nil
}

// approve is the person with another device.
func (i *idp) approve(_, code, _ string) {
	i.do(i.browser.PostForm(i.url+"/device/login", url.Values{"username": {"test-user2"}, "password": {"verysecure"}, "user_code": {code}}))
	i.do(i.browser.Get(i.url + "/device/confirm?action=allowed"))
}

func (i *idp) document() string {
	return `apiVersion: bulkhead.dev/v1
kind: Machine
hostname: n1
---
apiVersion: bulkhead.dev/v1
kind: Access
roles:
- {name: auditors, allow: [trust.v1.Trust/ListCertificates]}
bindings:
- {role: auditors, users: ["oidc:id1"]}
- {role: reader, users: ["oidc:id2"]}
oidc:
  issuer: ` + i.url + `
  clientID: bulkhead
  ca: |
    ` + strings.ReplaceAll(strings.TrimSpace(i.ca), "\n", "\n    ") + "\n"
}

func (n *node) dial(c client.Credentials) *grpc.ClientConn {
	conn, err := client.Dial(n.api, c)
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// get asks the REST door.
func (n *node) get(path, token string) (int, string) {
	n.t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(n.owner.CA)
	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	r, err := http.NewRequestWithContext(n.t.Context(), http.MethodGet, "https://"+n.rest+path, nil)
	n.must(err)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.Do(r)
	n.must(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	n.must(err)
	return resp.StatusCode, string(body)
}

// A person who has nothing but the cluster's authority signs in both ways, and does what the document says, at both doors.
func TestSignIn(t *testing.T) {
	i := newIDP(t)
	n := newNode(t, i.document())

	code, body := n.get("/v1/access/issuer", "")
	var told struct{ Issuer, ClientID string }
	if err := json.Unmarshal([]byte(body), &told); err != nil || code != http.StatusOK || told.Issuer != i.url || told.ClientID != "bulkhead" {
		t.Fatalf("what strangers are told: %d %s, %v", code, body, err)
	}
	l, err := login.Discover(t.Context(), login.Config{Issuer: told.Issuer, ClientID: told.ClientID, CA: []byte(i.ca)})
	n.must(err)
	ann, err := l.Browser(t.Context(), 0, i.browse)
	n.must(err)
	bob, err := l.Device(t.Context(), i.approve)
	n.must(err)
	again, err := l.Refresh(t.Context(), ann.Refresh)
	n.must(err)

	for _, c := range []struct {
		token, name, role string
		reader            codes.Code
	}{
		{ann.ID, "oidc:id1", "auditors", codes.PermissionDenied}, {again.ID, "oidc:id1", "auditors", codes.PermissionDenied}, {bob.ID, "oidc:id2", "reader", codes.Unimplemented},
	} {
		conn := n.dial(client.Credentials{CA: n.owner.CA, Token: c.token})
		me, err := accessv1.NewAccessClient(conn).WhoAmI(t.Context(), &accessv1.WhoAmIRequest{})
		if err != nil || me.Name != c.name || strings.Join(me.Roles, " ") != c.role {
			t.Errorf("got %v, %v, want %s with %s", me, err, c.name, c.role)
		}
		if _, err := trustv1.NewTrustClient(conn).ListCertificates(t.Context(), &trustv1.ListCertificatesRequest{}); err != nil {
			t.Errorf("%s may list certificates: %v", c.name, err)
		}
		_, err = trustv1.NewTrustClient(conn).MintToken(t.Context(), &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s mints: %v", c.name, err)
		}
		if code, body := n.get("/v1/access/whoami", c.token); code != http.StatusOK || !strings.Contains(body, c.name) {
			t.Errorf("REST: %d %s", code, body)
		}
		if code, body := n.get("/v1/certificates", c.token); code != http.StatusOK || !strings.Contains(body, "os-ca") {
			t.Errorf("REST: %d %s", code, body)
		}
	}
	if code, body := n.get("/v1/certificates", ann.ID+"x"); code != http.StatusUnauthorized || !strings.Contains(body, "signature is not the issuer") {
		t.Errorf("REST with a spoilt token: %d %s", code, body)
	}
	if code, body := n.get("/v1/certificates", ""); code != http.StatusUnauthorized {
		t.Errorf("REST without a token: %d %s", code, body)
	}
	me, err := accessv1.NewAccessClient(n.dial(n.owner)).WhoAmI(t.Context(), &accessv1.WhoAmIRequest{})
	if err != nil || me.Name != "owner" || strings.Join(me.Roles, " ") != "admin" {
		t.Errorf("the owner: %v, %v", me, err)
	}
}
