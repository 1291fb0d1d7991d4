// Package methods says of every method of ours what its proto says: who serves it, who may call it, whether it may be repeated.
// It is made from the protos by "make gen": a program that asked the protos' descriptors at run time would keep those of all services in its
// memory, half a megabyte in each daemon.
package methods

import (
	"slices"
	"strings"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
)

// Method is one method. It must not be changed.
type Method struct {
	Service, Name string        // as in a proto: "machine.v1.Machine", "GetVersion"
	ServedBy      string        // option served_by: the daemon whose socket answers; "" has no route from outside
	Need          []authv1.Role // option need; empty: nobody may call it
	Reads         bool          // it changes nothing (NO_SIDE_EFFECTS)
	Repeatable    bool          // calling it twice is as calling it once (any idempotency_level)
	ClientStreams bool
	ServerStreams bool
}

// Full is the name as grpc writes it: "/machine.v1.Machine/GetVersion".
func (m *Method) Full() string { return "/" + m.Service + "/" + m.Name }

// All returns every method, in the order of services and names. It must not be changed.
func All() []Method { return all[:] }

// Of returns a service's methods; none if it is not ours.
func Of(service string) []Method {
	from, found := slices.BinarySearchFunc(all[:], service, func(m Method, s string) int { return strings.Compare(m.Service, s) })
	if !found {
		return nil
	}
	to := from
	for to < len(all) && all[to].Service == service {
		to++
	}
	return all[from:to]
}

// Find returns a method by its name, with or without the slash at its begin; nil if it is not ours.
func Find(full string) *Method {
	service, name, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
	of := Of(service)
	for i := range of {
		if of[i].Name == name {
			return &of[i]
		}
	}
	return nil
}
