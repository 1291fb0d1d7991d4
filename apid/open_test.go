package apid

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
)

// Opening a volume takes a slow machine longer than a stranger's connection may live, and the owner becomes known meanwhile: the answer arrives all the same.
func TestUnlockTakesLong(t *testing.T) {
	t.Parallel()
	f := newFakeTrustd(t)
	f.state.Set(&trustv1.TrustState{Locked: true})
	n := bareNode(t, f, nil)
	n.grace = 2 * time.Second
	n.serve(n.bind("trustd"), func(s *grpc.Server) { trustv1.RegisterSignerServer(s, f) })
	n.start()
	key := string(unlock.NewRecoveryKey())
	s := &fakeStoraged{verifier: unlock.Verifier(unlock.Recovery, []byte(key), nil), begun: make(chan struct{}, 1), end: make(chan struct{})}
	n.serve(n.bind("storaged"), func(g *grpc.Server) { storagev1.RegisterUnlockServer(g, s) })
	n.waitTrust((*trustv1.TrustState).GetLocked)
	answer := make(chan error, 1)
	go func() {
		_, err := client.Unlock(n.ctx(), n.address, unlock.Recovery, key, client.Credentials{})
		answer <- err
	}()
	select {
	case <-s.begun:
	case err := <-answer:
		t.Fatalf("the unlocking ended at once: %v", err)
	}
	f.own()
	n.waitTrust((*trustv1.TrustState).GetClaimed)
	later, err := net.Dial("tcp", n.address) // it came after the one with the call, and its time is up after that one's
	n.must(err)
	defer later.Close()
	n.must(later.SetDeadline(time.Now().Add(30 * time.Second)))
	if _, err := later.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("a stranger who says nothing: %v, want that the connection ends", err)
	}
	close(s.end)
	if err := <-answer; err != nil {
		t.Errorf("the volumes were opened, and whoever did it hears: %v", err)
	}
}

// slow is a machined whose GetVersion takes until it is told to end.
type slow struct{ begun, end chan struct{} }

func (c *cluster) slow(n *node) slow {
	s := slow{make(chan struct{}, 4), make(chan struct{})}
	n.machined(&fakeMachined{version: func(ctx context.Context) (*machinev1.GetVersionResponse, error) {
		s.begun <- struct{}{}
		select {
		case <-s.end:
			return &machinev1.GetVersionResponse{}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	return s
}

// Another authority ends streams, and nothing new is let in, but whoever asked something before hears the answer: on the very connection of the stream, too.
func TestAuthorityReplacedDuringCall(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "cp1")
	n := c.nodes["cp1"]
	machined := c.slow(n)
	conn := c.admin("cp1")
	stream := streaming(t, n.ctx(), conn)
	answer := make(chan error, 1)
	go func() { answer <- getVersion(n.ctx(), conn) }()
	<-machined.begun
	other := newAuthority(t)
	c.tell(func(s *trustv1.TrustState) { s.OsCa = text(other.cert) })
	var m wrapperspb.StringValue
	says(t, "the stream", stream.RecvMsg(&m), codes.Unauthenticated, errStranger.Error())
	says(t, "a new call", getVersion(n.ctx(), conn), codes.Unauthenticated, errStranger.Error())
	select {
	case err := <-answer:
		t.Errorf("the call was cut: %v", err)
	case <-time.After(cutTime + cutTime/2): // connections of those who do not read are closed after that
	}
	close(machined.end)
	if err := <-answer; err != nil {
		t.Errorf("the call from before: %v", err)
	}
}

// It does not last for ever, and who is revoked meanwhile goes at once.
func TestAuthorityReplacedBound(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "cp1")
	n := c.nodes["cp1"]
	n.daemon.endTime = time.Second
	machined := c.slow(n)
	answer := make(chan error, 1)
	conn := c.admin("cp1")
	go func() { answer <- getVersion(n.ctx(), conn) }()
	<-machined.begun
	begin, other := time.Now(), newAuthority(t)
	c.tell(func(s *trustv1.TrustState) { s.OsCa = text(other.cert) })
	says(t, "a call that does not end", <-answer, codes.Unauthenticated, errStranger.Error())
	if took := time.Since(begin); took < n.daemon.endTime || took > within {
		t.Errorf("it was ended after %s", took)
	}
}

// Who is revoked goes at once, in the middle of a call with one answer too.
func TestRevokedDuringCall(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "cp1")
	n := c.nodes["cp1"]
	machined := c.slow(n)
	conn := n.dial(c.f.certificate(c.f.ca, "bob", "reader", -time.Minute, time.Hour))
	serial := n.serialOf(conn)
	answer := make(chan error, 1)
	go func() { answer <- getVersion(n.ctx(), conn) }()
	<-machined.begun
	begin := c.revoke(t, serial)
	says(t, "a call", <-answer, codes.Unauthenticated, "were revoked")
	if took := time.Since(begin); took > within {
		t.Errorf("it was ended after %s", took)
	}
}
