package apid

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
)

const (
	maxExchanges = 16
	maxEndpoints = 16
	maxRoots     = 64 << 10 // bytes
	// exchangeDial bounds how long one endpoint may take to connect.
	exchangeDial = 5 * time.Second
)

// outbound is outbound.v1.Outbound: it makes trustd's calls to other nodes.
type outbound struct {
	outboundv1.UnimplementedOutboundServer
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	slots chan struct{}
	stop  context.Context // of apid
	count figures
}

// Exchange makes one call on a connection of its own.
func (o *outbound) Exchange(in grpc.BidiStreamingServer[outboundv1.ExchangeRequest, outboundv1.ExchangeResponse]) (err error) {
	select {
	case o.slots <- struct{}{}:
		defer func() { <-o.slots }()
	default:
		return errs.New(errs.Exhausted, "%d exchanges at once already, which is the limit", maxExchanges)
	}
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	defer context.AfterFunc(o.stop, cancel)()
	first, err := in.Recv()
	if err != nil {
		return err
	}
	open := first.GetOpen()
	if open == nil {
		return errs.New(errs.Invalid, "exchange: the first message must be open")
	}
	cfg, err := exchangeTLS(open)
	if err != nil {
		return err
	}
	defer func() { o.count.exchanges.Add(1, open.GetMethod(), codeOf(err).String()) }()
	raw, endpoint, err := o.connect(ctx, open.GetEndpoints(), cfg)
	if err != nil {
		return err
	}
	binding, err := join.Binding(raw.ConnectionState(), open.GetBindingLabel())
	if err != nil {
		return errors.Join(err, raw.Close())
	}
	conn, err := over(raw, endpoint)
	if err != nil {
		return errors.Join(err, raw.Close())
	}
	defer func() { err = errors.Join(err, ignoreClosed(conn.Close())) }()
	if err := in.Send(&outboundv1.ExchangeResponse{What: &outboundv1.ExchangeResponse_Opened{Opened: &outboundv1.Opened{Endpoint: endpoint, Binding: binding}}}); err != nil {
		return err
	}
	err = talk(ctx, in, conn, open.GetMethod())
	if err != nil && o.stop.Err() != nil && in.Context().Err() == nil {
		return errs.New(errs.Unavailable, "apid is stopping; try again")
	}
	return err
}

func ignoreClosed(err error) error {
	if status.Code(err) == codes.Canceled || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// exchangeTLS checks what is asked for, and returns how to recognise the far side.
func exchangeTLS(o *outboundv1.Open) (*tls.Config, error) {
	label := labels[o.GetMethod()]
	switch {
	case label == "":
		return nil, errs.New(errs.Denied, "exchange: method %.100q: only Join, SignForNode, WatchCluster and ConfirmRotation of trust.v1, and the two halves of a join by TPM, go through here", o.GetMethod())
	case o.GetBindingLabel() != label:
		return nil, errs.New(errs.Invalid, "exchange: binding_label is %.100q; for %s it is %q", o.GetBindingLabel(), o.GetMethod(), label)
	case len(o.GetEndpoints()) == 0 || len(o.GetEndpoints()) > maxEndpoints:
		return nil, errs.New(errs.Invalid, "exchange: %d endpoints; allowed are 1 to %d", len(o.GetEndpoints()), maxEndpoints)
	case len(o.GetRoots()) > maxRoots:
		return nil, errs.New(errs.Invalid, "exchange: roots have %d bytes; allowed are %d", len(o.GetRoots()), maxRoots)
	}
	for _, e := range o.GetEndpoints() {
		if host, port, err := net.SplitHostPort(e); err != nil || host == "" || port == "" {
			return nil, errs.New(errs.Invalid, "exchange: endpoint %.100q is not HOST:PORT (IPv6: [ADDRESS]:PORT)", e)
		}
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: client.ServerName}
	if o.GetRoots() == "" {
		if !strings.HasPrefix(o.GetMethod(), "/"+trustv1.Join_ServiceDesc.ServiceName+"/") {
			return nil, errs.New(errs.Invalid, "exchange: %s needs roots: only Join may call somebody whom nobody vouches for", o.GetMethod())
		}
		cfg.InsecureSkipVerify = true // the token's secret, or the signature of the cluster's authority, proves who it is, on this very connection
		return cfg, nil
	}
	cfg.ServerName = join.ServerName // a worker, however broken into, is not believed
	cfg.RootCAs = x509.NewCertPool()
	if !cfg.RootCAs.AppendCertsFromPEM([]byte(o.GetRoots())) {
		return nil, errs.New(errs.Invalid, "exchange: roots: no PEM certificate in it")
	}
	return cfg, nil
}

// connect opens a connection to the first endpoint that answers, and says which it is.
func (o *outbound) connect(ctx context.Context, endpoints []string, cfg *tls.Config) (*tls.Conn, string, error) {
	var all []string
	for _, e := range endpoints {
		conn, err := dialTLS(ctx, o.dial, e, cfg, exchangeDial)
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close() // nobody waits for it
			}
			return nil, "", status.FromContextError(ctx.Err()).Err()
		case err == nil && conn.ConnectionState().NegotiatedProtocol == "h2":
			return conn, e, nil
		case err == nil:
			_ = conn.Close() // it is no apid
			err = errors.New("it does not speak HTTP/2: no apid")
		}
		all = append(all, e+": "+reason(err, exchangeDial))
	}
	return nil, "", errs.New(errs.Unavailable, "no endpoint answers: %s", strings.Join(all, "; "))
}

// over returns a client that has this one connection and never another: the binding is this one's.
func over(raw *tls.Conn, endpoint string) (*grpc.ClientConn, error) {
	var used atomic.Bool
	return grpc.NewClient("passthrough:///"+endpoint, append(backendOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is below, in raw
		grpc.WithAuthority(client.ServerName), grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: farAlive, Timeout: farSilent}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used.Swap(true) {
				return nil, errors.New("the connection was lost")
			}
			return raw, nil
		}))...)
}

// talk passes the request on, and the answers back.
func talk(ctx context.Context, in grpc.BidiStreamingServer[outboundv1.ExchangeRequest, outboundv1.ExchangeResponse], conn *grpc.ClientConn, method string) error {
	second, err := in.Recv()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return errs.New(errs.Invalid, "exchange: it ended before the request")
		}
		return err
	}
	request, ok := second.GetWhat().(*outboundv1.ExchangeRequest_Message)
	if !ok {
		return errs.New(errs.Invalid, "exchange: the second message must be message")
	}
	out, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method, grpc.ForceCodecV2(newRaw()))
	if err != nil {
		return err
	}
	if err := out.SendMsg(&frame{mem.BufferSlice{mem.SliceBuffer(request.Message)}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := out.CloseSend(); err != nil {
		return err
	}
	for {
		var f frame
		if err := out.RecvMsg(&f); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		answer := &outboundv1.ExchangeResponse{What: &outboundv1.ExchangeResponse_Message{Message: f.data.Materialize()}}
		f.data.Free()
		if err := in.Send(answer); err != nil {
			return err
		}
	}
}
