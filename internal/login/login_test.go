package login

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testissuer"
)

func discover(t *testing.T, i *testissuer.Issuer) *Issuer {
	t.Helper()
	got, err := Discover(t.Context(), Config{Issuer: i.URL, ClientID: i.ClientID, CA: []byte(i.CA)})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// browse is the person's browser: it follows redirects, to the loopback address too.
func browse(l *Issuer, address string) error {
	resp, err := l.client.Get(address)
	if err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
	}
	return err
}

func TestBrowser(t *testing.T) {
	i := testissuer.New(t)
	l := discover(t, i)
	got, err := l.Browser(t.Context(), 0, func(address string) error {
		u, err := url.Parse(address)
		if err != nil {
			return err
		}
		if u.Query().Get("scope") != "openid email groups offline_access" {
			t.Errorf("it asks for %s", u.Query().Get("scope"))
		}
		// Somebody else's answer does not end it, and says nothing.
		back := u.Query().Get("redirect_uri")
		if err := browse(l, back+"?code=x&state=guess"); err == nil {
			t.Error("a foreign answer was taken")
		}
		return browse(l, address)
	})
	if err != nil || got.Refresh == "" || time.Until(got.Expires) < time.Minute {
		t.Fatalf("got %v, %v", got, err)
	}
	if s := fmt.Sprintf("%v %+v %#v", got, got, got); s != "[secret] [secret] [secret]" {
		t.Errorf("tokens print as %s", s)
	}
	again, err := l.Refresh(t.Context(), got.Refresh)
	if err != nil || again.Refresh == got.Refresh || again.ID == "" {
		t.Errorf("refresh: %v, %v", again, err)
	}
	if _, err := l.Refresh(t.Context(), got.Refresh); !errors.Is(err, ErrSignIn) || !strings.Contains(err.Error(), "invalid_grant") {
		t.Errorf("a used refresh token: %v", err)
	}
}

func TestBrowserRefuses(t *testing.T) {
	i := testissuer.New(t)
	l := discover(t, i)
	for name, c := range map[string]struct{ query, want string }{
		"another issuer's answer": {"code=x&iss=https://evil.example", "came back from"},
		"an answer of nobody":     {"code=x", "came back from"},
		"the person said no":      {"error=access_denied&error_description=no&iss=" + i.URL, "access_denied no"},
		"a code of nobody":        {"code=x&iss=" + i.URL, "invalid_grant"},
		"no code":                 {"iss=" + i.URL, "without a code"},
	} {
		_, err := l.Browser(t.Context(), 0, func(address string) error {
			u, err := url.Parse(address)
			if err != nil {
				return err
			}
			_ = browse(l, u.Query().Get("redirect_uri")+"?state="+u.Query().Get("state")+"&"+c.query) // the page says that it went wrong
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := l.Browser(ctx, 0, func(string) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody came: %v", err)
	}
}

func TestDevice(t *testing.T) {
	i := testissuer.New(t)
	got, err := discover(t, i).Device(t.Context(), func(address, code, _ string) {
		if address != i.URL+"/activate" || !i.Approve(code) {
			t.Errorf("shown: %s, %s", address, code)
		}
	})
	if err != nil || got.ID == "" || got.Refresh == "" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestDiscoverRefuses(t *testing.T) {
	i := testissuer.New(t)
	for want, c := range map[string]Config{
		"https URL":         {Issuer: "http://a", ClientID: "b"},
		"no PEM":            {Issuer: i.URL, ClientID: "b", CA: []byte("x")},
		"calls itself":      {Issuer: i.URL + "/", ClientID: "b", CA: []byte(i.CA)},
		"unknown authority": {Issuer: i.URL, ClientID: "b"},
	} {
		if _, err := Discover(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	i.Down("fails")
	if _, err := Discover(t.Context(), Config{Issuer: i.URL, ClientID: "b", CA: []byte(i.CA)}); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("an issuer that is down: %v", err)
	}
}
