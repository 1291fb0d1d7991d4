// Package client is the way into a node from outside: claiming it, and connections with credentials.
//
// Programs on the operator's side use it (bhctl, tests). It knows nothing of files, contexts or output.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/bulkhead-os/bulkhead/internal/peer"
)

const (
	// Port is apid's.
	Port = "50000"
	// ServerName is in the certificate of every node, so that a node is recognised under whatever address it is reached.
	ServerName = "bulkhead"
	// MaxMessage is what a client receives at most, in bytes.
	MaxMessage = 16 << 20
)

// Credentials is what an operator holds. All is PEM but Token. Either Certificate and Key, or Token, or both are set.
type Credentials struct {
	// CA is the cluster's authority for the Bulkhead API. Required.
	CA []byte
	// Certificate and Key (PKCS #8) are the client's.
	Certificate, Key []byte
	// Token is a bearer token from trust.v1.Trust/MintToken.
	Token string
	// Learn is called with an authority (PEM) that takes the place of one in CA, as that one says; whoever keeps CA should keep both. It is called in a handshake, possibly several at once. nil: nobody keeps it.
	Learn func(authority []byte)
	// AnyTime takes the node's certificate whatever its dates say, for a node whose clock is wrong. Whose it is counts all the same; but one that somebody
	// took from a node long ago is taken too.
	AnyTime bool
}

// String keeps secrets out of logs.
func (Credentials) String() string { return "[secret]" }

// GoString does the same for %#v.
func (Credentials) GoString() string { return "[secret]" }

// Address returns "host:port" for an endpoint that may lack the port.
func Address(endpoint string) (string, error) {
	if endpoint == "" {
		return "", fmt.Errorf("endpoint: it is empty; write HOST or HOST:PORT")
	}
	if host, port, err := net.SplitHostPort(endpoint); err == nil && host != "" && port != "" {
		return endpoint, nil
	}
	if ip := net.ParseIP(endpoint); ip != nil {
		return net.JoinHostPort(endpoint, Port), nil
	}
	if host, port, err := net.SplitHostPort(endpoint + ":" + Port); err == nil && host != "" && port == Port {
		return endpoint + ":" + Port, nil
	}
	return "", fmt.Errorf("endpoint: %q is neither HOST nor HOST:PORT (IPv6: [ADDRESS]:PORT)", endpoint)
}

// TLS returns the configuration with which a client of apid or gateway recognises a node, and shows its own certificate if it has one.
func TLS(c Credentials) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: ServerName}
	if err := recognise(cfg, c); err != nil {
		return nil, err
	}
	if len(c.Certificate) > 0 || len(c.Key) > 0 {
		pair, err := tls.X509KeyPair(c.Certificate, c.Key)
		if err != nil {
			return nil, fmt.Errorf("credentials: certificate and key: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// withinDates is the time at which a certificate is valid that is nearest to now.
func withinDates(c *x509.Certificate, now time.Time) time.Time {
	switch {
	case now.Before(c.NotBefore):
		return c.NotBefore
	case now.After(c.NotAfter):
		return c.NotAfter
	}
	return now
}

// Dial returns a connection to a node's apid. It is opened when first used, and opened again when lost; calls wait for that, so
// a call needs a context with a deadline. Calls that may be repeated are. The caller closes it.
func Dial(endpoint string, c Credentials, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	address, err := Address(endpoint)
	if err != nil {
		return nil, err
	}
	cfg, err := TLS(c)
	if err != nil {
		return nil, err
	}
	all := append(peer.Patient(),
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
	)
	if c.Token != "" {
		all = append(all, grpc.WithPerRPCCredentials(bearer(c.Token)))
	}
	return grpc.NewClient(address, append(all, opts...)...)
}

// bearer puts the token into each call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}
func (bearer) RequireTransportSecurity() bool { return true }
func (bearer) String() string                 { return "[secret]" }
