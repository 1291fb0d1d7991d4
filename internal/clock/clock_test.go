package clock

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

var built = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

func TestJudgements(t *testing.T) {
	early, ok := time.Date(2016, 1, 1, 0, 0, 0, 0, time.UTC), built.Add(time.Hour)
	for name, c := range map[string]struct{ got, want string }{
		"years behind the image":  {Built(early, built), "the clock says 2016-01-01T00:00:00Z; this image was built 2026-11-26T12:00:00Z: set the machine's clock"},
		"years ahead":             {Built(built.AddDate(10, 0, 0), built), "more than five years after this image was built"},
		"right":                   {Built(ok, built), ""},
		"another time zone":       {Built(built.Add(-14*time.Hour), built), ""},
		"not known":               {Built(early, time.Time{}), ""},
		"as the cluster's":        {Cluster(ok, Slack), ""},
		"behind the cluster":      {Cluster(early, 10*365*24*time.Hour), "the control plane's said 2025-"},
		"ahead of the cluster":    {Cluster(ok, -time.Hour), "the control plane's said 2026-11-26T12:00:00Z"},
		"before its authority":    {Authority(early, built, "the cluster's authority"), "the cluster's authority is valid from 2026"},
		"after its authority":     {Authority(ok, built, "x"), ""},
		"within what clocks vary": {Authority(built.Add(-Slack), built, "x"), ""},
	} {
		if (c.want == "") != (c.got == "") || !strings.Contains(c.got, c.want) {
			t.Errorf("%s: %q, want %q", name, c.got, c.want)
		}
	}
}

func TestHandshake(t *testing.T) {
	cert := &x509.Certificate{NotBefore: built.Add(time.Hour), NotAfter: built.Add(25 * time.Hour)}
	invalid := fmt.Errorf("tls: %w", x509.CertificateInvalidError{Cert: cert, Reason: x509.Expired})
	for _, c := range []struct {
		name string
		err  error
		now  time.Time
		want string
	}{
		{"this clock is years behind", invalid, built.AddDate(-10, 0, 0), "the clock here says 2016-11-26T12:00:00Z, before this version was built"},
		{"one is behind", invalid, built, "is valid from 2026-11-26T13:00:00Z, and the clock here says 2026-11-26T12:00:00Z: one of the two"},
		{"it expired", invalid, built.AddDate(10, 0, 0), "was valid until 2026-11-27T13:00:00Z, and the clock here says 2036"},
		{"another reason", x509.CertificateInvalidError{Cert: cert, Reason: x509.TooManyIntermediates}, built, ""},
		{"no certificate", errors.New("refused"), built, ""},
	} {
		if got := Handshake(c.err, c.now, built); (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// What TLS itself says of such a certificate is understood.
func TestRealHandshake(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	s.Config.ErrorLog = nil
	wrong := s.Certificate().NotBefore.AddDate(-10, 0, 0)
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	conn, err := tls.Dial("tcp", s.Listener.Addr().String(), &tls.Config{RootCAs: pool, ServerName: "example.com", Time: func() time.Time { return wrong }})
	if err == nil {
		conn.Close()
		t.Fatal("a certificate of ten years later was taken")
	}
	if got := Handshake(err, wrong, time.Time{}); !strings.Contains(got, "is valid from") {
		t.Errorf("%v: %q", err, got)
	}
}
