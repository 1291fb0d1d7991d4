package apid

import (
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	// Linked for their descriptors: what is not linked has no route. A new package is added here.
	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	_ "github.com/bulkhead-os/bulkhead/api/config/v1"
	_ "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	_ "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	_ "github.com/bulkhead-os/bulkhead/api/machine/v1"
	_ "github.com/bulkhead-os/bulkhead/api/network/v1"
	_ "github.com/bulkhead-os/bulkhead/api/storage/v1"
	_ "github.com/bulkhead-os/bulkhead/api/trust/v1"
	_ "github.com/bulkhead-os/bulkhead/api/update/v1"
)

// route is what apid knows of one method.
type route struct {
	service, method string
	daemon          string // whose socket answers it; "": apid itself
	need            []authv1.Role
	stream          grpc.StreamDesc
	reads           bool // calls change nothing
}

// name is the full method as grpc writes it.
func (r *route) name() string { return "/" + r.service + "/" + r.method }

// audited reports whether calls are written into the audit log: all that a reader may not make.
func (r *route) audited() bool {
	for _, n := range r.need {
		if n == authv1.Role_READER || n == authv1.Role_ANYBODY || n == authv1.Role_KNOWN {
			return false
		}
	}
	return true
}

// routine reports whether nodes make such calls all the time: they are written only if they fail, or they would push all else out of the log. What they
// change, the register of nodes, shows who made the last one.
func (r *route) routine() bool { return r.name() == clusterv1.Registry_Report_FullMethodName }

// linkedRoutes makes the routes from the protos linked into this program: methods of services with a served_by option, whose need names
// a role that somebody outside of the node can have. All others have no route.
func linkedRoutes() map[string]*route {
	routes := map[string]*route{}
	add := func(s protoreflect.ServiceDescriptor, daemon string, need func(protoreflect.MethodDescriptor) []authv1.Role) {
		for i := range s.Methods().Len() {
			m := s.Methods().Get(i)
			r := &route{
				service: string(s.FullName()), method: string(m.Name()), daemon: daemon, need: need(m),
				stream: grpc.StreamDesc{StreamName: string(m.Name()), ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()},
			}
			o, _ := m.Options().(*descriptorpb.MethodOptions)
			r.reads = daemon == "" || o.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS
			if public(r.need) {
				routes[r.name()] = r
			}
		}
	}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			by, _ := proto.GetExtension(s.Options(), authv1.E_ServedBy).(string)
			switch {
			case string(s.FullName()) == accessv1.Access_ServiceDesc.ServiceName:
				add(s, "", needOf) // apid's own
			case by != "":
				add(s, by, needOf)
			}
		}
		return true
	})
	reader := func(protoreflect.MethodDescriptor) []authv1.Role { return []authv1.Role{authv1.Role_READER} }
	for _, f := range []protoreflect.FileDescriptor{
		healthv1.File_grpc_health_v1_health_proto, reflectionv1.File_grpc_reflection_v1_reflection_proto,
		reflectionv1alpha.File_grpc_reflection_v1alpha_reflection_proto,
	} {
		add(f.Services().Get(0), "", reader)
	}
	return routes
}

// needOf returns the roles in a method's proto.
func needOf(m protoreflect.MethodDescriptor) []authv1.Role {
	need, _ := proto.GetExtension(m.Options(), authv1.E_Need).([]authv1.Role)
	return need
}

// public reports whether somebody outside of the node may call a method. One INTERNAL makes it internal.
func public(need []authv1.Role) bool {
	for _, n := range need {
		if n == authv1.Role_INTERNAL || n == authv1.Role_ROLE_UNSPECIFIED {
			return false
		}
	}
	return len(need) > 0
}
