package apid

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/testissuer"
)

// lines are those of a node's log that have all the texts.
func (n *node) lines(texts ...string) (out []string) {
	for l := range strings.SplitSeq(n.log.String(), "\n") {
		has := true
		for _, t := range texts {
			has = has && strings.Contains(l, t)
		}
		if has {
			out = append(out, l)
		}
	}
	return out
}

// Whoever shows credentials that are not good here is refused, and there are an audit line that says why and an event, also if they only wanted to look.
func TestStrangeCredentials(t *testing.T) {
	c := newCluster(t, "cp1")
	c.machines()
	n := c.nodes["cp1"]
	other := &fakeTrustd{t: t, ca: newAuthority(t), token: newFakeTrustd(t).token}
	gone := c.f.certificate(c.f.ca, "bob", "admin", -time.Minute, time.Hour)
	c.revoke(t, serial(t, gone))
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) > 0 })
	ca := []byte(text(c.f.ca.cert))
	for _, x := range []struct {
		name       string
		creds      client.Credentials
		who        string
		why, event string
	}{
		{"of another cluster", c.f.certificate(other.ca, "ann", "admin", -time.Minute, time.Hour), `who=""`, "no valid credentials", "a certificate was shown at 127.0.0.1:"},
		{"revoked", gone, "who=bob", "were revoked", `a certificate of \"bob\" was shown at 127.0.0.1:`},
		{"expired", c.f.certificate(c.f.ca, "eve", "admin", -time.Hour, -time.Minute), `who=""`, "your certificate expired at", "your certificate expired at"},
		{"another cluster's token", client.Credentials{CA: ca, Token: other.mint("ann", "admin").Token}, `who=""`, "no valid credentials", "a token was shown at 127.0.0.1:"},
		{"a node that is none", c.f.holder(c.f.ca, nodeSubject("w9", "worker"), -time.Minute, time.Hour), "who=node:w9", `is no node of this cluster`, `a certificate of \"node:w9\" was shown`},
	} {
		before := n.log.String()
		wantCode(t, x.name, getVersion(n.ctx(), n.dial(x.creds, grpc.WithDisableRetry())), codes.Unauthenticated)
		if got := n.lines("msg=audit", "GetVersion", x.who, x.why, "code=Unauthenticated", "change=false"); len(got) == 0 || strings.Contains(before, got[len(got)-1]) {
			t.Errorf("%s: no audit line in\n%s", x.name, n.log)
		}
		if got := n.lines("msg=event", "type=access", x.event); len(got) == 0 || strings.Contains(before, got[len(got)-1]) {
			t.Errorf("%s: no event in\n%s", x.name, n.log)
		}
	}
	for range 3 * refusedBurst { // a flood of them fills no log
		wantCode(t, "again", getVersion(n.ctx(), n.dial(gone)), codes.Unauthenticated)
	}
	if is := len(n.lines("msg=event")); is > refusedBurst+2 {
		t.Errorf("%d events", is)
	}
	was := len(n.lines("msg=audit")) + len(n.lines("msg=event"))
	wantCode(t, "nothing shown", getVersion(n.ctx(), n.strangerConn()), codes.Unauthenticated)
	n.must(getVersion(n.ctx(), c.admin("cp1")))
	if is := len(n.lines("msg=audit")) + len(n.lines("msg=event")); is != was {
		t.Errorf("who shows nothing, and who may, are told of:\n%s", n.log)
	}
}

// An issuer that is down, and back, and a node that does not answer are events.
func TestOutagesAreTold(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	c.answer("10.5.0.12", func(context.Context) (net.Conn, error) { return nil, errors.New("no route to host") })
	for range 3 { // one event
		wantCode(t, "the node", getVersion(on(n.ctx(), "w1"), c.admin("cp1", grpc.WithDisableRetry())), codes.Unavailable)
	}
	if got := n.lines("msg=event", "type=cluster", `node \"w1\" does not answer: 10.5.0.12:50000`); len(got) != 1 {
		t.Errorf("the node: %q", got)
	}
	i := testissuer.New(t)
	n.trustd = c.f
	i.Down("fails")
	n.tellAccess(document(i, ""))
	if _, err := n.whoAmI(i.Token(nil)); err == nil {
		t.Error("believed without keys")
	}
	if got := n.lines("msg=event", "type=access", "nobody can sign in whose issuer's keys are not known", i.URL, "503"); len(got) != 1 {
		t.Errorf("the issuer: %q", got)
	}
	i.Down("")
	n.ahead.Add(int64(keysPause))
	if _, err := n.whoAmI(i.Token(nil)); err != nil {
		t.Errorf("back: %v", err)
	}
	for until := time.Now().Add(10 * time.Second); len(n.lines("msg=event", "the issuer "+i.URL+" answers again")) != 1; { // who waits for the keys is answered before
		if time.Now().After(until) {
			t.Fatalf("not told that it is back:\n%s", n.log)
		}
	}
}
