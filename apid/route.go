package apid

import (
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	// Linked for reflection, which answers with their descriptors. A new package is added here.
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
	"github.com/bulkhead-os/bulkhead/internal/methods"
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

// madeRoutes makes the routes from what the protos say (internal/methods): methods of services with a served_by option, whose need names
// a role that somebody outside of the node can have, and those that apid answers itself. All others have no route.
func madeRoutes() map[string]*route {
	routes := map[string]*route{}
	add := func(r *route) {
		if public(r.need) {
			routes[r.name()] = r
		}
	}
	all := methods.All()
	for i := range all {
		m := &all[i]
		own := m.Service == accessv1.Access_ServiceDesc.ServiceName
		if m.ServedBy == "" && !own {
			continue
		}
		r := &route{
			service: m.Service, method: m.Name, daemon: m.ServedBy, need: m.Need, reads: m.Reads || own,
			stream: grpc.StreamDesc{StreamName: m.Name, ServerStreams: m.ServerStreams, ClientStreams: m.ClientStreams},
		}
		if own {
			r.daemon = ""
		}
		add(r)
	}
	for _, s := range []*grpc.ServiceDesc{&healthv1.Health_ServiceDesc, &reflectionv1.ServerReflection_ServiceDesc, &reflectionv1alpha.ServerReflection_ServiceDesc} {
		reader := []authv1.Role{authv1.Role_READER}
		for _, m := range s.Methods {
			add(&route{service: s.ServiceName, method: m.MethodName, need: reader, reads: true, stream: grpc.StreamDesc{StreamName: m.MethodName}})
		}
		for _, m := range s.Streams {
			add(&route{service: s.ServiceName, method: m.StreamName, need: reader, reads: true, stream: grpc.StreamDesc{StreamName: m.StreamName, ServerStreams: m.ServerStreams, ClientStreams: m.ClientStreams}})
		}
	}
	return routes
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
