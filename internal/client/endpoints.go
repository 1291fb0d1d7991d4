package client

import (
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

const (
	// deadAfter bounds how long one of several endpoints may take to become a connection, TLS included. One that accepts and then says nothing is as dead as one that
	// refuses.
	deadAfter = 3 * time.Second
	// aliveEvery and aliveLimit find a connection whose far end has gone without a word; a node takes no more questions than one in ten seconds.
	aliveEvery = 10 * time.Second
	aliveLimit = 5 * time.Second
)

// DialAny is Dial for a cluster: the endpoints are tried in this order, the next one when one fails or is slow, and again when the connection is lost. One
// endpoint is Dial.
func DialAny(endpoints []string, c Credentials, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	switch len(endpoints) {
	case 0:
		return nil, errors.New("endpoint: there is none")
	case 1:
		return Dial(endpoints[0], c, opts...)
	}
	var all []resolver.Endpoint
	for _, e := range endpoints {
		address, err := Address(e)
		if err != nil {
			return nil, err
		}
		all = append(all, resolver.Endpoint{Addresses: []resolver.Address{{Addr: address}}})
	}
	fixed := manual.NewBuilderWithScheme("dns") // NewClient's own scheme for a bare address; names are looked up when they are dialled
	fixed.InitialState(resolver.State{Endpoints: all})
	return Dial(endpoints[0], c, append([]grpc.DialOption{grpc.WithResolvers(fixed), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
		MinConnectTimeout: deadAfter,
	}), grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: aliveEvery, Timeout: aliveLimit})}, opts...)...)
}
