package errs

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"google.golang.org/grpc/status"
)

// Kind and text survive a socket; the chain does not.
func TestKindsSurvive(t *testing.T) {
	for kind := Internal; kind <= Exists; kind++ {
		err := fmt.Errorf("outer: %w", New(kind, "read %q: %w", "x", io.EOF))
		if !errors.Is(err, io.EOF) || !Is(err, kind) {
			t.Errorf("kind %d here: %v has kind %d", kind, err, Of(err))
		}
		far := status.Convert(err).Err()
		if !Is(far, kind) || Text(far) != `outer: read "x": EOF` {
			t.Errorf("kind %d over a socket: kind %d, text %q", kind, Of(far), Text(far))
		}
	}
	far := fmt.Errorf("up: %w (see the console)", status.Convert(New(Invalid, "no")).Err())
	if Text(far) != "up: no (see the console)" {
		t.Errorf("wrapped after the socket: %q", Text(far))
	}
	if sent := status.Convert(Sent(fmt.Errorf("n1: %w", far))); sent.Message() != "n1: up: no (see the console)" || !Is(sent.Err(), Invalid) {
		t.Errorf("a server passes on: %v", sent)
	}
	if Of(io.EOF) != Internal || Is(nil, Internal) || Text(nil) != "" {
		t.Error("plain errors are Internal, nil is none")
	}
}
