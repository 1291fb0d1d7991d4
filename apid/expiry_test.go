package apid

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// A stream ends when the credential with which it was opened does, here and on another node; that of somebody else goes on.
func TestStreamsEndWithTheirCredentials(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	cert := n.dial(c.f.certificate(c.f.ca, "bob", "reader", -time.Minute, time.Hour))
	other := n.dial(c.f.certificate(c.f.ca, "ann", "reader", -time.Minute, 2*time.Hour))
	// A certificate is good to its second, a token for ten seconds more. The clock is such that this is soon.
	for _, x := range []struct {
		name string
		conn func() *grpc.ClientConn
		soon time.Duration
		says string
	}{
		{"a certificate's", func() *grpc.ClientConn { return cert }, time.Hour - 2*time.Second, "your certificate expired at"},
		{"a token's", func() *grpc.ClientConn { return n.dial(c.f.mint("ci", "reader")) }, time.Hour + tokenLeeway - 2*time.Second, "your token expired at"},
	} {
		n.ahead.Store(int64(x.soon))
		conn := x.conn()
		here, far := streaming(t, n.ctx(), conn), streaming(t, on(n.ctx(), "w1"), conn)
		stays := streaming(t, on(n.ctx(), "w1"), other)
		var m wrapperspb.StringValue
		says(t, x.name+" stream", here.RecvMsg(&m), codes.Unauthenticated, x.says)
		err := far.RecvMsg(&m)
		says(t, x.name+" stream on another node", err, codes.Unauthenticated, "open it again")
		n.must(stays.SendMsg(wrapperspb.String("y")))
		n.must(stays.RecvMsg(&m))
	}
	// The clock jumps: no timer notices, the next look does.
	n.ahead.Store(0)
	jumped := streaming(t, n.ctx(), cert)
	n.ahead.Store(int64(time.Hour))
	n.daemon.expire(n.daemon.cfg.Now())
	var m wrapperspb.StringValue
	says(t, "a stream before the clock jumped", jumped.RecvMsg(&m), codes.Unauthenticated, "your certificate expired at")
}

func TestExpired(t *testing.T) {
	end := time.Unix(1e9, 0)
	who := identity{name: "ann", expires: end}
	for _, c := range []struct {
		name string
		call *call
		late time.Duration
		kind errs.Kind
		text string // "": it goes on
	}{
		{"nothing shown", &call{}, time.Hour, 0, ""},
		{"a certificate", &call{proved: who}, -time.Nanosecond, 0, ""},
		{"an old certificate", &call{proved: who}, 0, errs.Unauthenticated, "bhctl certificate"},
		{"a token", &call{proved: who, byToken: true}, tokenLeeway - 1, 0, ""},
		{"an old token", &call{proved: who, byToken: true}, tokenLeeway, errs.Unauthenticated, "bhctl token"},
		{"a node's", &call{proved: identity{node: "cp1", expires: end}}, 0, errs.Unavailable, `node "cp1" opened this stream`},
	} {
		err := c.call.expired(end.Add(c.late))
		if (err == nil) != (c.text == "") || err != nil && (!errs.Is(err, c.kind) || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.text)
		}
	}
}

// Clocks that differ by years are told as that, to the holder of a good certificate and to nobody else.
func TestNotYetValid(t *testing.T) {
	c := newCluster(t, "cp1")
	c.machines()
	n := c.nodes["cp1"]
	good := n.dial(c.f.certificate(c.f.ca, "bob", "reader", -time.Minute, time.Hour))
	foreign := n.dial(c.f.certificate(newAuthority(t), "bob", "reader", -time.Minute, time.Hour))
	n.ahead.Store(int64(-24 * time.Hour))
	says(t, "a certificate of tomorrow", getVersion(n.ctx(), good), codes.Unauthenticated, "one of the two clocks is wrong")
	says(t, "a foreign one", getVersion(n.ctx(), foreign), codes.Unauthenticated, "no valid credentials")
	audited := func(text string) bool {
		return slices.ContainsFunc(n.audits(), func(l string) bool {
			return strings.Contains(l, "code=Unauthenticated") && strings.Contains(l, text)
		})
	}
	for years, text := range map[time.Duration]string{-10: "one of the two clocks is wrong", 10: "this node's clock says "} {
		n.ahead.Store(int64(years * 365 * 24 * time.Hour))
		says(t, fmt.Sprint("ten years: ", years), getVersion(n.ctx(), good), codes.Unauthenticated, text)
		if year := fmt.Sprint("this node's clock says ", time.Now().UTC().Add(years*365*24*time.Hour).Year()); !audited(year) {
			t.Errorf("%d years: no line with %q in %q", years, year, n.audits())
		}
	}
}
