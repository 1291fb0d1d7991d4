// Command init is PID 1 of a node: it brings up the verified root (boot), keeps units running (supervise) and ends everything in
// order (halt). In the processes that it makes it is also the trampoline (confine). It understands nothing: no protocol, no
// configuration, no network. Outside of a Bulkhead machine it refuses to do anything.
package main

import (
	"os"
	"runtime"

	"github.com/bulkhead-os/bulkhead/init/boot"
	"github.com/bulkhead-os/bulkhead/init/confine"
	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/init/halt"
	"github.com/bulkhead-os/bulkhead/init/supervise"
	"github.com/bulkhead-os/bulkhead/init/watchdog"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unmap"
)

//go:generate go run ../internal/unit/gen -tree .. -out units.go

func main() {
	runtime.LockOSThread() // to the main thread, which is what /proc/self shows: see package confine
	// A process that has just come into a namespace of processes does not see its parent.
	trampoline := len(os.Args) == 2 && (os.Args[0] == confine.Name || os.Args[0] == confine.Inside) && os.Getppid() <= 1
	if !trampoline && os.Getpid() != 1 || !boot.Ordered() {
		os.Stderr.WriteString("init: this is PID 1 of Bulkhead; it acts only as PID 1 and with the word bulkhead on the kernel command line\n")
		os.Exit(1)
	}
	switch {
	case trampoline:
		confine.Main(units, os.Args[1], os.Args[0] == confine.Inside)
	case confine.Held(os.Args):
		confine.Hold()
	case len(os.Args) > 2 && os.Args[1] == "supervise":
		serve(watchdog.Inherit(os.Args[2]))
	default:
		boot.First()
	}
}

// serve is the life of the machine. It does not return.
func serve(dog *watchdog.Dog) {
	defer func() { console.GiveUp("bulkhead: PID 1 is broken: ", reason(recover())) }()
	boot.Second(dog)
	program := unmap.Program()
	s, err := supervise.New(units, dog.Feed, func() {
		boot.Report()
		program.Drop() // most of it was for the start
	})
	if err != nil {
		console.GiveUp("bulkhead: cannot supervise: ", err.Error())
	}
	if boot.OnTrial() {
		s.Try(supervise.Trial{Good: unit.GoodFile, Judged: unit.JudgedFile, Locked: unit.LockedFile})
	}
	s.Name(supervise.Hostname{File: unit.HostnameFile, Owner: uint32(uid.Networkd)})
	order := s.Run(boot.Late)
	words := s.LastWords() // before the units are stopped: it says which are not up
	var names []string
	for _, u := range units {
		names = append(names, u.Name)
	}
	halt.All(names, s.Drain, dog.Feed, order == initctl.PowerOff, words)
}

// reason is what a panic says, or that there was none.
func reason(r any) string {
	switch r := r.(type) {
	case error:
		return r.Error()
	case string:
		return r
	}
	return "it came to an end"
}
