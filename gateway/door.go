package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-os/bulkhead/internal/gate"
)

// askTime bounds how long apid may take to say whether it knows a caller; it may be starting.
const askTime = 20 * time.Second

// visit is what is learnt about one request on its way.
type visit struct {
	refusal  error // apid's, of a caller that it does not know
	tooLarge bool  // the body is longer than it may be
}

type visitKey struct{}

type placeKey struct{}

// withPlace makes a connection's place in the gate known to its requests.
func withPlace(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if place, ok := c.(*gate.Conn); ok {
		ctx = context.WithValue(ctx, placeKey{}, place)
	}
	return ctx
}

// guarded lets nothing of a body be read before apid knows who sends it: else strangers could fill the memory, or keep places with
// bodies that never end. The gateway itself trusts and refuses nobody. A request with a body of a caller whom apid does not know goes on
// without body and without token, so that apid refuses it like any other, and audits it.
func (g *Gateway) guarded(next http.Handler) http.Handler {
	health := healthv1.NewHealthClient(g.cfg.Apid)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := &visit{}
		r = r.WithContext(context.WithValue(r.Context(), visitKey{}, v))
		place, _ := r.Context().Value(placeKey{}).(*gate.Conn)
		hasBody := r.ContentLength != 0
		token := r.Header.Get("Authorization")
		var err error
		switch {
		case token == "":
			err = status.Error(codes.Unauthenticated, "no token")
		case hasBody || place != nil && !place.Known():
			ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(r.Context(), "authorization", token), askTime)
			_, err = health.Check(ctx, &healthv1.HealthCheckRequest{})
			cancel()
			if known(err) && place != nil {
				place.Know()
			}
		}
		switch {
		case hasBody && status.Code(err) == codes.Unauthenticated:
			if token != "" {
				v.refusal = err
			}
			r.Header.Del("Authorization")
			r.Body, r.ContentLength = http.NoBody, 0
			unread(w)
		case hasBody && !known(err):
			unread(w)
			writeProblem(w, status.Convert(err))
			return
		case r.ContentLength > maxBody:
			unread(w)
			writeProblemAs(w, http.StatusRequestEntityTooLarge, errTooLarge)
			return
		case hasBody:
			r.Body = &body{http.MaxBytesReader(w, r.Body, maxBody), w, v}
		}
		next.ServeHTTP(w, r)
	})
}

// unread makes the server answer without waiting for the body, and end the connection after the answer.
func unread(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(time.Second)) // a client that sends on shall not lose the answer to a reset
}

// known reports whether apid's answer is to somebody it knows, whatever else it says.
func known(err error) bool {
	switch status.Code(err) {
	case codes.OK, codes.PermissionDenied: // health is for readers; who may only make backups is known too
		return true
	}
	return false
}

var errTooLarge = status.Newf(codes.ResourceExhausted, "the body is too large; allowed are %d bytes", maxBody)

// body remembers that it was too long, which grpc-gateway turns into a text.
type body struct {
	io.ReadCloser
	w     http.ResponseWriter
	visit *visit
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if e := new(http.MaxBytesError); errors.As(err, &e) {
		b.visit.tooLarge = true
		unread(b.w)
	}
	return n, err
}

// refuse writes the answer to a request that failed.
func refuse(ctx context.Context, w http.ResponseWriter, err error) {
	s := status.Convert(err)
	v, _ := ctx.Value(visitKey{}).(*visit)
	switch {
	case v != nil && v.tooLarge:
		writeProblemAs(w, http.StatusRequestEntityTooLarge, errTooLarge)
	case v != nil && v.refusal != nil && s.Code() == codes.Unauthenticated:
		writeProblem(w, status.Convert(v.refusal)) // says more than what apid says to one without a token
	default:
		writeProblem(w, s)
	}
}

// certificate waits for trustd's signature: just after a start there is none yet, and a handshake that fails then is one call lost.
func (g *Gateway) certificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	ctx, cancel := context.WithTimeout(h.Context(), headerTimeout)
	defer cancel()
	if _, err := g.cfg.Leaf.Wait(ctx); err != nil {
		return nil, err
	}
	return g.cfg.Leaf.GetCertificate(h)
}
