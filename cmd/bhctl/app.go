package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// defaultTimeout bounds one unary call. It is longer than any restart of a daemon.
const defaultTimeout = 30 * time.Second

// app is what all commands share: where they write, and the flags of the root command.
type app struct {
	in       io.Reader
	out, err io.Writer

	contextName, endpoint, token, format string
	timeout                              time.Duration
	wrongClock                           bool // --wrong-clock

	nodes    []string // --node
	allNodes bool     // --all
	label    string   // what the node is called where several are spoken of
	node     string   // the node that is to answer; "": the one that is asked
	args     []string // the command line, without the program's name

	fan    *fanout          // this app is for one of several nodes; nil: it is not
	shared *grpc.ClientConn // all those use one connection, which is not theirs to close
}

// dial returns a connection to the node of the context, or of the flags. The caller closes it.
func (a *app) dial(ctx context.Context) (*grpc.ClientConn, error) {
	c, err := a.target()
	if err != nil {
		return nil, err
	}
	if err := a.freshen(ctx, c); err != nil {
		return nil, err
	}
	cred := c.credentials()
	cred.AnyTime = a.wrongClock
	cred.Learn = a.learn
	return client.DialAny(c.all(), cred)
}

// target is the context to use, with the flags' values in it.
func (a *app) target() (*clusterContext, error) {
	cfg, err := loadContexts()
	if err != nil {
		return nil, err
	}
	c, err := cfg.pick(a.contextName)
	if err != nil {
		return nil, err
	}
	if a.endpoint != "" {
		c.Endpoint, c.Endpoints = a.endpoint, nil
	}
	if a.token != "" {
		c.Token, c.Certificate, c.Key, c.SignIn = a.token, "", "", nil
	}
	return c, nil
}

// call dials, gives f a context with the call's time limit, and closes.
func (a *app) call(ctx context.Context, f func(context.Context, *grpc.ClientConn) error) error {
	limit := a.timeout
	if limit == 0 {
		limit = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return a.stream(ctx, f)
}

// stream is call without a limit, unless --timeout gives one.
func (a *app) stream(ctx context.Context, f func(context.Context, *grpc.ClientConn) error) error {
	conn := a.shared
	if conn == nil {
		var err error
		if conn, err = a.dial(ctx); err != nil {
			return err
		}
		defer conn.Close()
	}
	ctx = client.OnNode(ctx, a.node)
	if a.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	return f(ctx, conn)
}

// receive reads a stream to its end; the user's Ctrl-C is an end too.
func receive[T any](s grpc.ServerStreamingClient[T], f func(*T) error) error {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f(m); err != nil {
			return err
		}
	}
}

// explain adds to an error what the user can do about it.
func explain(err error) string {
	text := errs.Text(err)
	switch status.Code(err) {
	case codes.Unauthenticated:
		if strings.Contains(text, "your ID token of") { // it says itself what to do
			return text
		}
		return text + "\n  The node does not know you. Check the context (bhctl config show), or get credentials: bhctl claim on a new node,\n  bhctl login where the cluster has an issuer, or ask an administrator for bhctl token / bhctl certificate.\n  Credentials of before the cluster's authority was replaced (bhctl trust rotate-ca) are worth nothing any more."
	case codes.PermissionDenied:
		if strings.Contains(text, "needs role") { // others say themselves what to do
			return text + "\n  Ask an administrator for a credential with that role: bhctl token --role ROLE."
		}
	case codes.Unavailable:
		if strings.Contains(text, "certificate has expired or is not yet valid") {
			return text + "\n  One of the two clocks is wrong, this machine's or the node's, or the node could not renew its certificate. This machine's says " +
				time.Now().UTC().Format(time.RFC3339) + ";\n  the node's is set with the machine's own, in its firmware or hypervisor, and read when it starts."
		}
		if strings.Contains(text, "certificate") {
			return text + "\n  The node's certificate is not signed by this context's authority: is it another node, was it reset, or is its volume STATE\n  locked? Its console says so; then: bhctl unlock. Or the cluster's authority was replaced (bhctl trust rotate-ca) and this context has slept\n  through it: then ask an administrator for a new context (bhctl certificate NAME --as CONTEXT), or for the authority of now (bhctl config ca)."
		}
		return text + "\n  Is the node up, and the endpoint right? bhctl config show; for a local machine: bhctl status."
	case codes.DeadlineExceeded:
		return text + "\n  The node did not answer in time; --timeout 2m waits longer."
	}
	return text
}

func (a *app) checkFormat() error {
	switch a.format {
	case "table", "json", "yaml":
		return nil
	}
	return fmt.Errorf("--output: %q is none of table, json, yaml", a.format)
}
