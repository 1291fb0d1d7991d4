package apid

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method as every caller of the matrix, through sockets, to apid as it is. What a message
// says does not change who may call: the outcome is the matrix's, or a refusal of the message itself.
func FuzzCalls(f *testing.F) {
	c := newCluster(f, "cp1", "cp2", "w1")
	n := c.nodes["cp1"]
	c.tell(func(s *trustv1.TrustState) { s.Revoked = []string{"id-of-revoked"} })
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) > 0 })
	n.tellAccess(matrixRoles)
	told, _ := n.daemon.spec.Get()
	answer := grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(reached, "reached") })
	for name := range n.daemon.conns {
		if name != trustd {
			n.anything(name, answer)
		}
	}
	callers, methods := c.callers("cp1"), testrpc.Methods()
	testrpc.Seeds(f, methods, len(callers))
	testfuzz.Run(f, func(t *testing.T, method uint16, caller uint8, data []byte) {
		m, who := methods[int(method)%len(methods)], callers[int(caller)%len(callers)]
		call := testrpc.Make(m, data)
		served := strings.Contains(fmt.Sprint(m.Parent().Options()), "served_by")
		want := expected(string(m.Parent().FullName()), string(m.Name()), needOf(m), served, who)
		quiet := time.Duration(0)
		if slices.Contains(want, codes.OK) || slices.Contains(want, reached) {
			quiet = 100 * time.Millisecond
		}
		n.daemon.spec.Set(told) // machined may have told another before, with other roles
		err := call.Do(who.ctx, who.conn, quiet)
		call.Judge(t, err)
		got := status.Code(err)
		if strings.HasPrefix(status.Convert(err).Message(), "unknown service") {
			got = reached
		}
		refused := got == codes.InvalidArgument || got == codes.ResourceExhausted || got == codes.Internal // the message, by grpc: Judge knows
		if !slices.Contains(want, got) && !refused && !(got == codes.OK && slices.Contains(want, reached)) {
			t.Errorf("%s by %s: %v, want %v", call.Name(), who.name, err, want)
		}
		if log := n.log.String(); strings.Contains(log, "panicked") {
			t.Fatalf("%s by %s: %s", call.Name(), who.name, log)
		}
	})
}
