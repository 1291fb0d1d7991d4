package apid

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// expectedFar is the outcome of a call that names another node. It is what the node itself would say to the same caller, but for what is not passed on:
// what is tied to a connection, what nodes call, what was passed on once, and anything through a worker.
func expectedFar(service, method string, need []authv1.Role, served bool, c caller, throughWorker bool) []codes.Code {
	needs := func(r authv1.Role) bool { return slices.Contains(need, r) }
	public := served && len(need) > 0 && !needs(authv1.Role_INTERNAL)
	named := c.roles != nil
	// A role of the document counts where the node that answers is: dns-team's everywhere, here's on control planes.
	may := customMay(first(c.roles), service, method) && (first(c.roles) == "dns-team" || throughWorker)
	passedOn := strings.Contains(c.name, " for a") && !c.unix
	unlocks := needs(authv1.Role_UNLOCK) && slices.Contains(c.roles, "admin") // what is tied to its connection is passed on for nobody
	switch {
	case !public, needs(authv1.Role_CLAIM):
		return expected(service, method, need, served, c)
	case needs(authv1.Role_JOIN), unlocks:
		return []codes.Code{codes.InvalidArgument}
	case !named:
		return []codes.Code{codes.Unauthenticated}
	case passedOn: // one hop
		return []codes.Code{codes.PermissionDenied, codes.FailedPrecondition}
	}
	let := may && !needs(authv1.Role_NODE) && !needs(authv1.Role_UNLOCK)
	if !let && !customMay(first(c.roles), service, method) {
		let = !slices.Contains(expected(service, method, need, served, c), codes.PermissionDenied)
	}
	switch {
	case !let, slices.Contains(c.roles, "node"), throughWorker:
		return []codes.Code{codes.PermissionDenied}
	case needs(authv1.Role_ANYBODY):
		return []codes.Code{codes.NotFound} // there is no issuer there either
	case needs(authv1.Role_KNOWN):
		return []codes.Code{codes.OK}
	}
	return []codes.Code{reached}
}

func first(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

// The same for another node: who may not call a method there does not get to it through a control plane either, and nobody gets anywhere through a worker.
func TestMatrixForward(t *testing.T) {
	c := judged(t)
	for near, far := range map[string]string{"cp1": "w1", "w1": "cp1"} {
		callers := c.callers(near)
		for i := range callers {
			callers[i].ctx = with(callers[i].ctx, peer.NodeKey, far)
		}
		everyMethod(func(m protoreflect.MethodDescriptor, served bool) {
			service := string(m.Parent().FullName())
			name := "/" + service + "/" + string(m.Name())
			for _, who := range callers {
				if who.unix && who.local != uid.Gateway {
					continue // daemons name no node; TestWitness has the one that does
				}
				want := expectedFar(service, string(m.Name()), needOf(m), served, who, near == "w1")
				if got := callOnce(who, m, name); !slices.Contains(want, got) {
					t.Errorf("%s of %s through %s by %s: %v, want %v", name, far, near, who.name, got, want)
				}
			}
		})
	}
}
