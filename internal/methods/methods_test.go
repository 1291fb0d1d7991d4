package methods

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
)

// The table says what the protos say, read in another way than by the program that made it. (apid's matrix compares what every method answers with every proto.)
func TestTable(t *testing.T) {
	seen := 0
	for _, f := range []protoreflect.FileDescriptor{machinev1.File_machine_v1_machine_proto, trustv1.File_trust_v1_trust_proto, trustv1.File_trust_v1_join_proto} {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			of := Of(string(s.FullName()))
			if len(of) != s.Methods().Len() {
				t.Errorf("%s: %d methods, want %d", s.FullName(), len(of), s.Methods().Len())
			}
			for j := range s.Methods().Len() {
				seen++
				m := s.Methods().Get(j)
				by, _ := proto.GetExtension(s.Options(), authv1.E_ServedBy).(string)
				need, _ := proto.GetExtension(m.Options(), authv1.E_Need).([]authv1.Role)
				level := m.Options().(*descriptorpb.MethodOptions).GetIdempotencyLevel()
				got := Find("/" + string(s.FullName()) + "/" + string(m.Name()))
				if got == nil {
					t.Errorf("%s is missing", m.FullName())
				} else if got.ServedBy != by || !slices.Equal(got.Need, need) || got.Reads != (level == descriptorpb.MethodOptions_NO_SIDE_EFFECTS) ||
					got.Repeatable != (level != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN) || got.ClientStreams != m.IsStreamingClient() || got.ServerStreams != m.IsStreamingServer() {
					t.Errorf("%s: %+v, but the proto says %q, %v, %v", m.FullName(), *got, by, need, level)
				}
			}
		}
	}
	if seen < 30 {
		t.Errorf("only %d methods were compared", seen)
	}
	if !slices.IsSortedFunc(all[:], func(a, b Method) int { return strings.Compare(a.Service, b.Service) }) {
		t.Error("the table is not in the order of services: Of searches in it")
	}
	for _, none := range []string{"", "/", "machine.v1.Machine", "/machine.v1.Machine/", "/grpc.health.v1.Health/Check"} {
		if m := Find(none); m != nil {
			t.Errorf("Find(%q) = %+v", none, *m)
		}
	}
}
