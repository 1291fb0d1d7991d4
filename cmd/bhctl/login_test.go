package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	"github.com/bulkhead-os/bulkhead/internal/testissuer"
)

// fakeAccess takes ID tokens as they are: what apid makes of them is tested there.
type fakeAccess struct {
	accessv1.UnimplementedAccessServer
	issuer *testissuer.Issuer
}

func (f *fakeAccess) GetIssuer(ctx context.Context, _ *accessv1.GetIssuerRequest) (*accessv1.GetIssuerResponse, error) {
	if f.issuer == nil {
		return nil, status.Error(codes.NotFound, "this node's configuration names no issuer (Access.oidc): there is nowhere to sign in")
	}
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("authorization")) > 0 {
		return nil, status.Error(codes.Internal, "a token came with the question where to get one")
	}
	return &accessv1.GetIssuerResponse{Issuer: f.issuer.URL, ClientId: f.issuer.ClientID}, nil
}

func (f *fakeAccess) WhoAmI(ctx context.Context, _ *accessv1.WhoAmIRequest) (*accessv1.WhoAmIResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	token := strings.Join(md.Get("authorization"), "")
	if token == "" {
		return &accessv1.WhoAmIResponse{Name: "admin", Roles: []string{"admin"}, How: "certificate", Expires: timestamppb.New(time.Unix(2e9, 0))}, nil
	}
	var claims struct {
		Email  string
		Groups []string
		Exp    int64
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err == nil {
		err = json.Unmarshal(raw, &claims)
	}
	if err != nil || claims.Exp < time.Now().Unix() {
		return nil, status.Errorf(codes.Unauthenticated, "your ID token of x is refused: expired at %d (%v)", claims.Exp, err)
	}
	return &accessv1.WhoAmIResponse{Name: "oidc:" + claims.Email, How: "oidc", Roles: claims.Groups, Groups: claims.Groups, Expires: timestamppb.New(time.Unix(claims.Exp, 0))}, nil
}

// signInTo is a cluster with an issuer, as a user with a certificate for it finds it.
func signInTo(t *testing.T) (*testissuer.Issuer, string) {
	i := testissuer.New(t)
	i.Groups = []string{"reader"}
	f, c := startFake(t)
	f.access.issuer = i
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yaml")
	writeContexts(t, file, c)
	must(t, os.WriteFile(filepath.Join(dir, "issuer.pem"), []byte(i.CA), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "cluster.pem"), []byte(c.Contexts["demo"].CA), 0o600))
	t.Setenv("BHCONFIG", file)
	t.Setenv("BROWSER", "")
	t.Setenv("ISSUER_CA", filepath.Join(dir, "issuer.pem"))
	return i, dir
}

// browser is $BROWSER in tests: it follows where it is sent.
func browser() {
	pem, err := os.ReadFile(os.Getenv("ISSUER_CA"))
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	resp, err := c.Get(os.Args[1])
	if err != nil {
		panic(err)
	}
	_, _ = io.Copy(os.Stderr, resp.Body)
}

func TestLoginWithBrowser(t *testing.T) {
	i, dir := signInTo(t)
	path, err := os.Executable() // testscript.Main makes programs of its names
	must(t, err)
	must(t, os.Symlink(path, filepath.Join(dir, "browser")))
	t.Setenv("BROWSER", filepath.Join(dir, "browser"))
	out, errs, err := run(t, t.Context(), "login", "--issuer-ca", filepath.Join(dir, "issuer.pem"))
	if err != nil || !strings.HasPrefix(out, `signed in as oidc:ann@example.org, roles: reader; context "demo"`) {
		t.Fatalf("got %s, %s, %v", out, errs, err)
	}
	out, _, err = run(t, t.Context(), "whoami")
	if err != nil || !strings.Contains(out, "oidc:ann@example.org  oidc  reader") {
		t.Errorf("got %s, %v", out, err)
	}
	info, err := os.Stat(filepath.Join(dir, "config.yaml"))
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("the file's mode is %s", info.Mode())
	}
	if out, _, _ = run(t, t.Context(), "config", "show"); strings.Contains(out, "eyJ") || !strings.Contains(out, i.URL) {
		t.Errorf("shown: %s", out)
	}
	if out, _, err = run(t, t.Context(), "logout"); err != nil || !strings.Contains(out, "its certificate is used again") {
		t.Errorf("got %s, %v", out, err)
	}
	if out, _, err = run(t, t.Context(), "whoami"); err != nil || !strings.Contains(out, "admin  certificate") {
		t.Errorf("after signing out: %s, %v", out, err)
	}
	if _, _, err = run(t, t.Context(), "logout"); err == nil || !strings.Contains(err.Error(), "nobody is signed in") {
		t.Errorf("signing out twice: %v", err)
	}
}

// approving reads what bhctl says, as a person with a telephone does.
type approving struct {
	mu     sync.Mutex
	issuer *testissuer.Issuer
	said   string
}

func (a *approving) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.said += string(p)
	if _, code, ok := strings.Cut(string(p), "type the code  "); ok {
		a.issuer.Approve(strings.TrimSpace(code))
	}
	return len(p), nil
}

// A new user, without a context, on a machine without a screen.
func TestLoginWithDevice(t *testing.T) {
	i, dir := signInTo(t)
	cfg, err := loadContexts()
	must(t, err)
	endpoint := cfg.Contexts["demo"].Endpoint
	t.Setenv("BHCONFIG", filepath.Join(dir, "new", "config.yaml"))
	t.Setenv("SSH_CONNECTION", "x")
	login := func(args ...string) (string, error) {
		var out strings.Builder
		a := &app{in: strings.NewReader(""), out: &out, err: &approving{issuer: i}, args: args}
		root := a.root()
		root.SetArgs(args)
		err := root.ExecuteContext(t.Context())
		return out.String(), err
	}
	if _, err := login("login"); err == nil || !strings.Contains(err.Error(), "--endpoint HOST and --ca FILE") {
		t.Errorf("without a context: %v", err)
	}
	out, err := login("login", "--endpoint", endpoint, "--ca", filepath.Join(dir, "cluster.pem"), "--as", "prod", "--issuer-ca", filepath.Join(dir, "issuer.pem"))
	if err != nil || !strings.Contains(out, `context "prod"`) {
		t.Fatalf("got %s, %v", out, err)
	}
	if out, _, err := run(t, t.Context(), "whoami"); err != nil || !strings.Contains(out, "oidc:ann") {
		t.Errorf("got %s, %v", out, err)
	}
}

// A sign-in that is about to end is renewed without a word, once, however many processes need it; and when it cannot be, the words say what to do.
func TestRenewal(t *testing.T) {
	i, dir := signInTo(t)
	path, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(path, filepath.Join(dir, "browser")))
	t.Setenv("BROWSER", filepath.Join(dir, "browser"))
	i.Life = early - time.Second
	_, _, err = run(t, t.Context(), "login", "--issuer-ca", filepath.Join(dir, "issuer.pem"))
	must(t, err)
	i.Life = time.Hour
	before := i.Asked("/token")
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if out, errs, err := run(t, t.Context(), "whoami"); err != nil || errs != "" || !strings.Contains(out, "oidc:ann") {
				t.Errorf("got %s, %s, %v", out, errs, err)
			}
		})
	}
	all.Wait()
	if n := i.Asked("/token") - before; n != 1 {
		t.Errorf("renewed %d times", n)
	}

	end := func(how func()) string {
		cfg, err := loadContexts()
		must(t, err)
		cfg.Contexts["demo"].SignIn.Expires = time.Now().Add(-time.Minute)
		must(t, cfg.save())
		how()
		_, _, err = run(t, t.Context(), "whoami")
		return fmt.Sprint(err)
	}
	if got := end(func() { i.Down("fails") }); !strings.Contains(got, "503") || !strings.Contains(got, "bhctl logout goes back") {
		t.Errorf("the issuer is down: %s", got)
	}
	i.Down("")
	if got := end(i.Forget); !strings.Contains(got, "invalid_grant") || !strings.Contains(got, ": bhctl login") {
		t.Errorf("a refresh token that is void: %s", got)
	}
}

func TestLoginRefuses(t *testing.T) {
	i, dir := signInTo(t)
	i.Down("fails")
	for want, args := range map[string][]string{
		"503":                            {"--issuer-ca", filepath.Join(dir, "issuer.pem")},
		"unknown authority":              {},
		"--issuer-ca: open nowhere":      {"--issuer-ca", "nowhere"},
		"[issuer client-id]":             {"--issuer", "https://a"},
		"none of the others can be; [br": {"--browser", "--device"},
	} {
		if _, _, err := run(t, t.Context(), append([]string{"login"}, args...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", args, err, want)
		}
	}
}
