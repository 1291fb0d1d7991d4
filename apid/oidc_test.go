package apid

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/testissuer"
)

// document is one that trusts an issuer: ann may reboot, and the group ops may operate.
func document(i *testissuer.Issuer, more string) string {
	return `apiVersion: bulkhead.dev/v1
kind: Access
roles:
- {name: rebooters, allow: [machine.v1.Machine/Reboot]}
bindings:
- {role: rebooters, users: ["oidc:ann@example.org"]}
- {role: operator, groups: ["oidc:ops"]}
oidc:
  issuer: ` + i.URL + `
  clientID: ` + i.ClientID + `
  usernameClaim: email
` + more + "  ca: |\n    " + strings.ReplaceAll(strings.TrimSpace(i.CA), "\n", "\n    ") + "\n"
}

// signedIn returns a connection with an ID token.
func (n *node) signedIn(token string) *grpc.ClientConn {
	return n.dial(client.Credentials{CA: []byte(text(n.trustd.ca.cert)), Token: token})
}

func (n *node) whoAmI(token string) (string, error) {
	r, err := accessv1.NewAccessClient(n.signedIn(token)).WhoAmI(n.ctx(), &accessv1.WhoAmIRequest{})
	return fmt.Sprint(r.GetName(), " ", r.GetHow(), " ", r.GetRoles(), " ", r.GetGroups()), err
}

func TestSignedIn(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	i := testissuer.New(t)
	n.tellAccess(document(i, ""))
	issuer, err := accessv1.NewAccessClient(n.strangerConn()).GetIssuer(n.ctx(), &accessv1.GetIssuerRequest{})
	if err != nil || issuer.Issuer != i.URL || issuer.ClientId != "bulkhead" {
		t.Errorf("what strangers are told: %v, %v", issuer, err)
	}
	for _, c := range []struct {
		groups      []string
		claims      map[string]any
		who         string
		get, reboot codes.Code
	}{
		{nil, nil, "oidc:ann@example.org oidc [rebooters] []", codes.PermissionDenied, codes.OK},
		{[]string{"ops", "x"}, nil, "oidc:ann@example.org oidc [operator rebooters] [oidc:ops oidc:x]", codes.OK, codes.OK},
		{[]string{"ops"}, map[string]any{"email": "bob"}, "oidc:bob oidc [operator] [oidc:ops]", codes.OK, codes.OK},
		{nil, map[string]any{"email": "bob", "groups": "ops"}, "oidc:bob oidc [operator] [oidc:ops]", codes.OK, codes.OK},
		// What a token says about roles, and names of others, count for nothing.
		{[]string{"admin", "bulkhead:admin"}, map[string]any{"email": "admin", "roles": []string{"admin"}}, "oidc:admin oidc [] [oidc:admin oidc:bulkhead:admin]", codes.PermissionDenied, codes.PermissionDenied},
	} {
		i.Groups = c.groups
		token := i.Token(c.claims)
		if got, err := n.whoAmI(token); err != nil || got != c.who {
			t.Errorf("got %s, %v, want %s", got, err, c.who)
		}
		conn := n.signedIn(token)
		wantCode(t, c.who+": GetVersion", getVersion(n.ctx(), conn), c.get)
		_, err := machinev1.NewMachineClient(conn).Reboot(n.ctx(), &machinev1.RebootRequest{})
		wantCode(t, c.who+": Reboot", err, c.reboot)
	}
	if n := i.Asked("/keys"); n != 1 {
		t.Errorf("keys were read %d times", n)
	}
	// Bindings are for who signed in: the same name in a token of the cluster is somebody else's.
	if got, err := n.whoAmI(n.trustd.mint("oidc:ann@example.org").Token); err != nil || got != "oidc:ann@example.org token [] []" {
		t.Errorf("a token of the cluster: %s, %v", got, err)
	}
	i.Rotate("rsa1", true)
	n.ahead.Add(int64(keysPause))
	if got, err := n.whoAmI(i.Token(nil)); err != nil || !strings.HasPrefix(got, "oidc:ann") {
		t.Errorf("with a new key: %s, %v", got, err)
	}
	// Revoked by its id, and bound to nothing any more, on an open connection.
	token := i.Token(nil)
	conn := n.signedIn(token)
	me, err := accessv1.NewAccessClient(conn).WhoAmI(n.ctx(), &accessv1.WhoAmIRequest{})
	n.must(err)
	n.tellAccess(strings.Replace(document(i, ""), "ann@", "eve@", 1))
	_, err = machinev1.NewMachineClient(conn).Reboot(n.ctx(), &machinev1.RebootRequest{})
	wantCode(t, "without a binding", err, codes.PermissionDenied)
	s, _ := n.trustd.state.Get()
	n.trustd.state.Set(&trustv1.TrustState{Claimed: true, OsCa: s.OsCa, TokenKeys: s.TokenKeys, Revoked: []string{me.Id}})
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) > 0 })
	if _, err := n.whoAmI(token); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "were revoked") {
		t.Errorf("revoked: %v", err)
	}
}

// Every token that is not good is refused with its cause.
func TestIDTokenRefused(t *testing.T) {
	n := newNode(t, true)
	i, other := testissuer.New(t), testissuer.New(t)
	n.tellAccess(document(i, "  audience: nodes\n"))
	good := map[string]any{"aud": "nodes"}
	but := func(claim string, v any) string {
		all := map[string]any{"aud": "nodes", claim: v}
		return i.Token(all)
	}
	header := func(method jwt.SigningMethod, key any, name string, v any) string {
		tok := jwt.NewWithClaims(method, jwt.MapClaims{"iss": i.URL, "aud": "nodes", "email": "ann@example.org", "exp": time.Now().Add(time.Hour).Unix()})
		tok.Header["kid"] = "k1"
		if name != "" {
			tok.Header[name] = v
		}
		s, err := tok.SignedString(key)
		n.must(err)
		return s
	}
	mine, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	if _, err := n.whoAmI(i.Token(good)); err != nil {
		t.Errorf("a good token: %v", err)
	}
	at := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	cut := i.Token(good)
	for _, c := range []struct{ name, token, want string }{
		{"no signature", header(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, "", nil), `it is signed with "none"; allowed are RS256`},
		{"HMAC with the public key", header(jwt.SigningMethodHS256, []byte(i.CA), "", nil), `it is signed with "HS256"; allowed are RS256`},
		{"a key of one's own under the issuer's name", header(jwt.SigningMethodES256, mine, "", nil), "its signature is not the issuer's"},
		{"a signature cut off", cut[:strings.LastIndexByte(cut, '.')+1], "its signature is not the issuer's"},
		{"an access token", header(jwt.SigningMethodES256, mine, "typ", "at+jwt"), `it is of type "at+jwt" and no ID token`},
		{"a foreign issuer", other.Token(good), "this cluster takes ID tokens of " + i.URL},
		{"another audience", i.Token(nil), `it is for ["bulkhead"] (aud) and not for "nodes"`},
		{"given to another client", but("azp", "phone"), `it was given to client "phone" (azp) and not to "bulkhead"`},
		{"for several", but("aud", []string{"nodes", "x"}), "does not say to whom it was given (azp)"},
		{"expired", but("exp", at(-time.Minute)), "it expired at "},
		{"without an end", but("exp", nil), "exp claim is required"},
		{"not yet valid", but("nbf", at(time.Hour)), "it is not valid before "},
		{"no name", but("email", nil), `its claim "email", which is to be the person's name, is`},
		{"a name for a log", but("email", "a\nb"), `allowed are 1 to 256 printable characters`},
		{"an address that nobody verified", but("email_verified", false), "the issuer has not verified"},
		{"groups that are none", but("groups", map[string]any{"a": 1}), "is neither a text nor a list of texts"},
		{"an unknown key", header(jwt.SigningMethodES256, mine, "kid", "k9"), `it is signed with key "k9", which is none of the issuer's`},
	} {
		_, err := n.whoAmI(c.token)
		if status.Code(err) != codes.Unauthenticated || !strings.Contains(status.Convert(err).Message(), c.want) {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	for _, garbage := range []string{"x", "x.y.z", strings.Repeat("a", maxIDToken+1), "e30.e30.e30"} {
		if _, err := n.whoAmI(garbage); status.Convert(err).Message() != errStranger.Error() {
			t.Errorf("garbage %.20q: %v", garbage, err)
		}
	}
	if n := i.Asked("/keys"); n > 2 {
		t.Errorf("keys were read %d times", n)
	}
}

// An issuer that is down stops those whose keys are not known, says so, and nobody else.
func TestIssuerDown(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	i := testissuer.New(t)
	i.Groups = []string{"ops"}
	n.tellAccess(document(i, ""))
	known := i.Token(nil)
	if _, err := n.whoAmI(known); err != nil {
		t.Fatal(err)
	}
	i.Down("fails")
	n.ahead.Add(int64(keysPause))
	i.Rotate("k2", false)
	for range 3 { // asked once
		_, err := n.whoAmI(i.Token(nil))
		if got := status.Convert(err).Message(); status.Code(err) != codes.Unauthenticated || !strings.Contains(got, i.URL) || !strings.Contains(got, "503") || !strings.Contains(got, `key "k2", which is not known here`) {
			t.Errorf("a new key of an issuer that is down: %v", err)
		}
	}
	if got := i.Asked("/.well-known/openid-configuration"); got != 2 {
		t.Errorf("the issuer was asked %d times, want 2", got)
	}
	figures := map[string]bool{}
	for _, f := range n.daemon.cfg.Env.Metrics.Families() {
		figures[f.GetName()] = len(f.GetSamples()) > 0 && f.GetSamples()[0].GetValue() > 0
	}
	if !figures["bulkhead_apid_issuer_keys_read_timestamp_seconds"] || !figures["bulkhead_apid_issuer_failures_total"] {
		t.Errorf("figures: %v", figures)
	}
	if _, err := n.whoAmI(i.Token(map[string]any{"email": "bob"})); err == nil {
		t.Error("a key that is not known was believed")
	}
	if got, err := n.whoAmI(known); err != nil || !strings.Contains(got, "operator") {
		t.Errorf("a known key of an issuer that is down: %s, %v", got, err)
	}

	// It hangs: who waits for it does, and others do not.
	i.Down("hangs")
	n.ahead.Add(int64(keysPause))
	ctx, cancel := context.WithCancel(n.ctx())
	waits := make(chan error, 1)
	conn := n.signedIn(i.Token(nil))
	go func() {
		_, err := accessv1.NewAccessClient(conn).WhoAmI(ctx, &accessv1.WhoAmIRequest{})
		waits <- err
	}()
	for i.Asked("/.well-known/openid-configuration") < 3 {
		select {
		case err := <-waits:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		n.must(getVersion(n.ctx(), n.signedIn(known)))
		n.must(getVersion(n.ctx(), n.dial(n.holder("admin"))))
		n.must(getVersion(n.ctx(), n.dial(n.trustd.mint("prometheus", "reader"))))
	}
	cancel()
	<-waits
	i.Down("")
}

// Break-glass: the owner's certificate asks nobody. It works when the issuer never answered, and trustd (so etcd) has gone.
func TestBreakGlass(t *testing.T) {
	f := newFakeTrustd(t)
	f.own()
	n := bareNode(t, f, nil)
	kill := n.serve(n.bind("trustd"), func(s *grpc.Server) { trustv1.RegisterSignerServer(s, f) })
	n.start()
	n.machined(&fakeMachined{})
	i := testissuer.New(t)
	gone, err := net.Listen("tcp", "127.0.0.1:0") // an address at which nobody answers
	n.must(err)
	n.must(gone.Close())
	n.tellAccess(strings.ReplaceAll(document(i, ""), i.URL, "https://"+gone.Addr().String()))
	admin := n.dial(n.holder("admin"))
	n.must(getVersion(n.ctx(), admin))
	kill()
	n.must(getVersion(n.ctx(), admin))
	fresh := n.dial(n.holder("admin"))
	_, err = machinev1.NewMachineClient(fresh).Reboot(n.ctx(), &machinev1.RebootRequest{})
	n.must(err)
	if got, err := n.whoAmI(i.Token(map[string]any{"iss": "https://" + gone.Addr().String()})); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "certificates and tokens of the cluster work") {
		t.Errorf("an ID token meanwhile: %s, %v", got, err)
	}
}

// A machine whose battery is empty says that it is 1990: nobody can be recognised but the owner, whose certificate is as old as the authority.
func TestBreakGlassClock(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	made := n.trustd.ca.cert.NotBefore
	issue := func(name, role string, from time.Time) client.Credentials {
		return n.trustd.holder(n.trustd.ca, pkix.Name{CommonName: name, Organization: []string{"bulkhead:" + role}}, time.Until(from), time.Hour)
	}
	n.ahead.Store(int64(time.Until(made.AddDate(-10, 0, 0))))
	owner := n.dial(issue("owner", "admin", made))
	n.must(getVersion(n.ctx(), owner))
	_, err := machinev1.NewMachineClient(owner).Reboot(n.ctx(), &machinev1.RebootRequest{})
	n.must(err)
	wantCode(t, "a reader of that day", getVersion(n.ctx(), n.dial(issue("ann", "reader", made))), codes.Unauthenticated)
	wantCode(t, "an administrator of later", getVersion(n.ctx(), n.dial(issue("ann", "admin", made.Add(time.Minute)))), codes.Unauthenticated)
	wantCode(t, "an administrator of another cluster", getVersion(n.ctx(), n.dial(n.trustd.certificate(newAuthority(t), "ann", "admin", -time.Minute, time.Hour))), codes.Unauthenticated)
	n.ahead.Store(int64(2 * time.Hour)) // a clock that nothing proves wrong is believed
	wantCode(t, "the owner after the certificate's end", getVersion(n.ctx(), owner), codes.Unauthenticated)
}

// Who signed in is passed on to other nodes like anybody: the near node has checked the token, and the far one knows nothing of the issuer.
func TestSignedInAcrossNodes(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	for _, n := range c.nodes {
		n.machined(&fakeMachined{})
	}
	i := testissuer.New(t)
	cp1 := c.nodes["cp1"]
	cp1.trustd = c.f
	cp1.tellAccess(document(i, ""))
	i.Groups = []string{"ops"}
	conn := cp1.signedIn(i.Token(map[string]any{"email": "bob"}))
	on := client.OnNode(cp1.ctx(), "w1")
	_, err := machinev1.NewMachineClient(conn).Reboot(on, &machinev1.RebootRequest{})
	cp1.must(err)
	r, err := accessv1.NewAccessClient(conn).WhoAmI(on, &accessv1.WhoAmIRequest{})
	if err != nil || r.Name != "oidc:bob" || fmt.Sprint(r.Roles) != "[operator]" || r.How != howForwarded {
		t.Errorf("at the far node: %v, %v", r, err)
	}
	_, err = machinev1.NewMachineClient(cp1.signedIn(i.Token(map[string]any{"groups": nil}))).Reboot(on, &machinev1.RebootRequest{})
	wantCode(t, "a role that only the near node knows", err, codes.PermissionDenied)
}
