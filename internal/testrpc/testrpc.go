// Package testrpc sends random messages to services, for fuzz targets: every method that there is, by whoever the test says. A message is
// made of the fuzzer's bytes: as its type has it, with values that are likely to hurt, or garbage.
package testrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A Call is one call of a method: the messages as they stand on the wire.
type Call struct {
	Method   protoreflect.MethodDescriptor
	Messages [][]byte
}

// Name is the call's method as gRPC writes it.
func (c Call) Name() string {
	return "/" + string(c.Method.Parent().FullName()) + "/" + string(c.Method.Name())
}

// Methods returns every method of ours that the test binary links, by name; with services, theirs only.
func Methods(services ...string) (all []protoreflect.MethodDescriptor) {
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		if !strings.Contains(fmt.Sprint(file.Options()), "github.com/bulkhead-os/bulkhead") {
			return true
		}
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			if len(services) > 0 && !slices.Contains(services, string(s.FullName())) {
				continue
			}
			for j := range s.Methods().Len() {
				all = append(all, s.Methods().Get(j))
			}
		}
		return true
	})
	slices.SortFunc(all, func(a, b protoreflect.MethodDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	return all
}

// Make makes a call of the fuzzer's bytes. Equal bytes make equal calls.
func Make(m protoreflect.MethodDescriptor, data []byte) Call {
	s := source{data}
	c := Call{Method: m}
	garbage, n := s.next()%8 == 7, 1
	if m.IsStreamingClient() {
		n += int(s.next() % 4)
	}
	for range n {
		if garbage {
			c.Messages = append(c.Messages, s.take(int(s.next())+1))
			continue
		}
		text, err := proto.MarshalOptions{Deterministic: true}.Marshal(s.message(m.Input(), 0))
		if err != nil {
			panic(err) // what is made here can be written
		}
		c.Messages = append(c.Messages, text)
	}
	return c
}

// wire is a codec for messages that are bytes already.
type wire struct{}

func (wire) Name() string { return "proto" }

func (wire) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (wire) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = slices.Clone(data)
	return nil
}

// Do makes the call and takes at most one answer. A stream that has none within quiet is ended; its outcome is codes.OK then. 0 is for calls that must be answered: a refusal
// may take its time on a busy host, and silence is none.
func (c Call) Do(ctx context.Context, conn *grpc.ClientConn, quiet time.Duration) error {
	limit := 10 * time.Second
	streams := c.Method.IsStreamingServer() || c.Method.IsStreamingClient()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: c.Method.IsStreamingClient()}, c.Name(), grpc.ForceCodec(wire{}), grpc.WaitForReady(false))
	if err != nil {
		return err
	}
	for _, m := range c.Messages {
		if err := s.SendMsg(&m); err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why
			return err
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	ended := false
	if streams && quiet > 0 {
		timer := time.AfterFunc(quiet, func() { ended = true; cancel() })
		defer timer.Stop()
	}
	var answer []byte
	err = s.RecvMsg(&answer)
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled && streams && ctx.Err() != nil && ended {
		return nil
	}
	return err
}

// Judge reports what no answer may be, whatever was asked: a crash, an error without a kind or without a sentence, none in time.
func (c Call) Judge(t testing.TB, err error) {
	t.Helper()
	code, text := status.Code(err), status.Convert(err).Message()
	switch {
	case err == nil:
		return
	case code == codes.Internal && strings.Contains(text, "unmarshal"): // grpc's own, for garbage
	case code == codes.Unknown, code == codes.DataLoss, code == codes.DeadlineExceeded, code == codes.Internal:
		t.Errorf("%s with %x: %v", c.Name(), c.Messages, err)
	}
	if text == "" || !utf8.ValidString(text) || len(text) > 8<<10 || strings.TrimSpace(text) != text {
		t.Errorf("%s with %x: the refusal is %d bytes: %.600q", c.Name(), c.Messages, len(text), text)
	}
}

// source hands out the fuzzer's bytes; when there are no more, zeros.
type source struct{ data []byte }

func (s *source) next() byte {
	if len(s.data) == 0 {
		return 0
	}
	b := s.data[0]
	s.data = s.data[1:]
	return b
}

// take hands out so many, or all that there are.
func (s *source) take(n int) []byte {
	n = min(n, len(s.data))
	out := s.data[:n]
	s.data = s.data[n:]
	return out
}

// texts are those that parsers have trouble with, and some that mean something to daemons.
var texts = []string{
	"", "n1", "cp1", "admin", "../../etc/passwd", "a\x00b", "*", "-1", "99999999999999999999", "10.0.0.7", "2001:db8::/32", "0.0.0.0/0", "fe80::1%eth0", "/dev/vda", "/", "etcdd",
	"STATE", "1h", "-5m", "2026-01-01T00:00:00Z", strings.Repeat("x", 70000), strings.Repeat("[", 5000), "bhj1_x.y", "é\u202e", "recovery", "passphrase:0", "a b\nc", "%s%n",
	"apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: worker\n", "apiVersion: bulkhead.dev/v1\nkind: Storage\n", "&a [*a, *a]", strings.Repeat("0", 64),
	"/bulkhead/kubernetes/x", "/bulkhead/machine/x", "/bulkhead/trust/x", "reboot", "w1", "https://127.0.0.1:1/x", "127.0.0.1:1/x/y:1", // where nobody listens
}

func (s *source) message(d protoreflect.MessageDescriptor, depth int) *dynamicpb.Message {
	m := dynamicpb.NewMessage(d)
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		how := s.next()
		if how%4 == 0 || depth > 4 {
			continue
		}
		switch {
		case f.IsMap():
			for range how % 5 {
				key := s.value(m, f.MapKey(), depth).MapKey()
				var v protoreflect.Value
				if f.MapValue().Message() != nil {
					v = protoreflect.ValueOfMessage(s.message(f.MapValue().Message(), depth+1))
				} else {
					v = s.value(m, f.MapValue(), depth)
				}
				m.Mutable(f).Map().Set(key, v)
			}
		case f.IsList():
			list, n := m.Mutable(f).List(), int(how%7)
			if how == 255 {
				n = 2000
			}
			for range n {
				list.Append(s.value(m, f, depth))
			}
		default:
			m.Set(f, s.value(m, f, depth))
		}
	}
	return m
}

// value makes one value of a field, an element of it if it is a list.
func (s *source) value(_ *dynamicpb.Message, f protoreflect.FieldDescriptor, depth int) protoreflect.Value {
	number := func() int64 {
		b := s.next()
		return []int64{0, 1, -1, math.MaxInt64, math.MinInt64, math.MaxInt32, 1 << 40, int64(b), int64(s.next())<<8 | int64(b)}[b%9]
	}
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return protoreflect.ValueOfMessage(s.message(f.Message(), depth+1))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(s.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(s.text()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(s.next()%2 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(int8(s.next())))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(number()))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(number()))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(number())
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(number()))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(number()))
	default: // DoubleKind
		return protoreflect.ValueOfFloat64([]float64{0, math.NaN(), math.Inf(1), math.Inf(-1), -1}[s.next()%5])
	}
}

// text is one of texts, or the fuzzer's own.
func (s *source) text() string {
	b := s.next()
	if int(b) < 3*len(texts) {
		return texts[int(b)%len(texts)]
	}
	return strings.ToValidUTF8(string(s.take(int(s.next()))), "?")
}

// Seeds adds to a target, whose arguments are a method's number, a caller's number and bytes, some calls of every method.
func Seeds(f *testing.F, methods []protoreflect.MethodDescriptor, callers int) {
	f.Helper()
	if len(methods) == 0 {
		f.Fatal("no methods: the test binary does not link them")
	}
	for i := range methods {
		for n, pattern := range []string{"", "\x00\x01\x1c", "\x01\x01\x02\x05\x03\x14\x07\x09", "\x07\xff\xff\x0a\x01", "\x02\xff\x14"} {
			f.Add(uint16(i), uint8((i*5+n)%callers), []byte(strings.Repeat(pattern, 12)))
		}
	}
}
