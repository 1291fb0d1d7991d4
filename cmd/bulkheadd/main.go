// Bulkheadd holds the light daemons and runs the one that its name (argv[0]) says: eight processes share one text.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sort"
	"strings"

	"github.com/bulkhead-os/bulkhead/apid"
	"github.com/bulkhead-os/bulkhead/gateway"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/networkd"
	"github.com/bulkhead-os/bulkhead/services/machined"
	"github.com/bulkhead-os/bulkhead/services/updated"
	"github.com/bulkhead-os/bulkhead/storaged"
	"github.com/bulkhead-os/bulkhead/trustd"
)

func main() {
	daemons := map[string]func(context.Context, daemon.Env) error{
		"apid":     apid.Run,
		"gateway":  gateway.Run,
		"machined": machined.Run,
		"networkd": networkd.Run,
		"storaged": storaged.Run,
		"trustd":   trustd.Run,
		"updated":  updated.Run,
	}
	name := filepath.Base(os.Args[0])
	run, ok := daemons[name]
	if !ok {
		var names []string
		for n := range daemons {
			names = append(names, n)
		}
		sort.Strings(names)
		fmt.Fprintf(os.Stderr, "bulkheadd: %q is no daemon; argv[0] must be one of %s\n", name, strings.Join(names, ", "))
		os.Exit(unit.DoNotRestart)
	}
	debug.SetGCPercent(heapGrowth)
	go staySmall()
	daemon.Main(name, run)
}
