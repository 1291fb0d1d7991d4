// Package errs gives the few errors that need one a kind which survives a socket.
//
// All other errors arrive at the caller as Internal. Lost in transit: the wrapped chain; kept: kind and text.
package errs

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Kind says what the caller can do about an error. The zero value is Internal.
type Kind uint8

const (
	Internal        Kind = iota // a defect or a broken machine
	Invalid                     // the request is wrong whatever the state: correct it
	NotFound                    // the thing named does not exist
	Conflict                    // it is older than what is there, or somebody else was first: look again
	Denied                      // the caller may not
	Unavailable                 // not now: try again
	Precondition                // something else must be done first; the text says what
	Unauthenticated             // the caller did not show who it is
	Exhausted                   // a limit is reached; the text names it
	Exists                      // another one of that name is there already
)

var code = [...]codes.Code{
	Internal: codes.Internal, Invalid: codes.InvalidArgument, NotFound: codes.NotFound, Conflict: codes.Aborted,
	Denied: codes.PermissionDenied, Unavailable: codes.Unavailable, Precondition: codes.FailedPrecondition,
	Unauthenticated: codes.Unauthenticated, Exhausted: codes.ResourceExhausted, Exists: codes.AlreadyExists,
}

type kinded struct {
	kind Kind
	err  error
}

func (e *kinded) Error() string { return e.err.Error() }
func (e *kinded) Unwrap() error { return e.err }

// GRPCStatus makes grpc send kind and text; wrapped or not.
func (e *kinded) GRPCStatus() *status.Status { return status.New(code[e.kind], Text(e.err)) }

// New returns an error of a kind. The format may wrap with %w.
func New(kind Kind, format string, args ...any) error {
	return &kinded{kind, fmt.Errorf(format, args...)}
}

// Is reports whether an error is of a kind, also one that came over a socket.
func Is(err error, kind Kind) bool { return err != nil && Of(err) == kind }

// Of returns the error's kind; Internal for those that have none.
func Of(err error) Kind {
	var k *kinded
	if errors.As(err, &k) {
		return k.kind
	}
	if s, ok := status.FromError(err); ok {
		for kind, c := range code {
			if c == s.Code() {
				return Kind(kind)
			}
		}
	}
	return Internal
}

// Sent returns err as a server is to send it: grpc would put its own "rpc error: code = … desc = " into the middle of an error that wraps another server's.
func Sent(err error) error {
	var far interface{ GRPCStatus() *status.Status }
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok || !errors.As(err, &far) {
		return err
	}
	p := far.GRPCStatus().Proto()
	p.Message = Text(err)
	return status.FromProto(p).Err()
}

// Text returns what to show a person: the whole chain without grpc's "rpc error: code = … desc = ".
func Text(err error) string {
	if err == nil {
		return ""
	}
	var far interface {
		error
		GRPCStatus() *status.Status
	}
	if errors.As(err, &far) {
		return strings.Replace(err.Error(), far.Error(), far.GRPCStatus().Message(), 1)
	}
	return err.Error()
}
