package nodeaddr

import (
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzDefault reads the kernel's table of routes.
func FuzzDefault(f *testing.F) {
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	f.Add(head + "eth0\t00000000\t0202000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\neth1\t00000000\t0202000A\t0003\t0\t0\t-5\t00000000\t0\t0\t0\n")
	f.Add(head)
	testfuzz.Run(f, func(t *testing.T, routes string) {
		if name := Default(routes); strings.ContainsAny(name, " \t\n") || !strings.Contains(routes, name) {
			t.Errorf("%q: %q", routes, name)
		}
	})
}

// FuzzInURL reads addresses out of a document's endpoint.
func FuzzInURL(f *testing.F) {
	for _, u := range []string{"https://10.0.0.7:6443", "https://[fd00::1%25eth0]:6443", "https://[::ffff:10.0.0.7]", "https://name", "://", ""} {
		f.Add(u)
	}
	testfuzz.Run(f, func(t *testing.T, u string) {
		if a := InURL(u); a.Is4In6() || a.IsValid() && len(Parse([]string{a.String()})) != 1 {
			t.Errorf("%q: %s", u, a)
		}
	})
}
