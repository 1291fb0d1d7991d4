// Package supervise keeps units running: it starts them, restarts them, and answers on the control socket. One loop owns every
// wait, so nothing here is locked. It understands nothing of what units do.
package supervise

import (
	"bytes"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const (
	killAgain   = 5 * time.Second  // between two tries to kill what does not die: it hangs in the kernel
	stopTimeout = 10 * time.Second // of units that say nothing
	lookOften   = 100 * time.Millisecond
	lookSeldom  = time.Second
	reportPause = time.Minute
	reapAtOnce  = 256              // processes
	startLimit  = 10 * time.Second // late units wait no longer for early ones to be up
)

// processes is what a supervisor needs of the kernel. Its methods do not block.
type processes interface {
	spawn(v *service, ready int) (pid int, err error)
	kill(v *service, s unix.Signal)          // the main process
	sweep(v *service)                        // the main process has ended: nothing else of the unit may stay; it knows whether memory was why
	wait() (pid int, status unix.WaitStatus) // one that has ended; pid 0: none
}

// A service is a unit and what is known about it.
type service struct {
	*unit.Unit
	log    logPipe
	listen []int // in the order of Unit.Listen
	cgroup int
	holder *service // whose namespaces it lives in, or nil
	told   int      // read end of the pipe in which its trampoline says which process it has become; 0: none
	killed bool     // cgroup.kill was used
	kills  int      // of processes of its group, for its memory limit, so far
	broken error    // what it lacks, and does not start without

	state    State
	since    time.Time // of the state
	timer    time.Time // when Timer happens; zero: never
	pid      int
	ready    int       // read end of its ready pipe, or -1
	began    time.Time // of the process
	up       time.Time // when it became ready
	failures int       // in a row
	hangs    bool      // was killed, and has not ended
	restarts uint32
	end      uint8 // how the last process ended, as in initctl.Record
	value    uint8
}

// A Supervisor runs units. Only one goroutine may use it.
type Supervisor struct {
	kernel  processes
	units   []*service // sorted by name
	epoll   int
	wake    int            // eventfd: a process may have ended
	on      map[int]func() // what to do when a descriptor is ready
	conns   map[int]*conn
	look    time.Time    // when to look at the log pipes and feed the watchdog
	feed    func()       // the hardware watchdog
	report  func()       // what only PID 1 can read
	next    time.Time    // when to report
	order   initctl.Verb // Reboot or PowerOff, once somebody has asked
	halting bool
	trial   Trial // see Try

	hostname Hostname // see Name
}

func newSupervisor(units []*service, k processes, socket string) (s *Supervisor, err error) {
	s = &Supervisor{kernel: k, units: units, on: map[int]func(){}, conns: map[int]*conn{}, feed: func() {}, report: func() {}}
	slices.SortFunc(s.units, func(a, b *service) int { return strings.Compare(a.Name, b.Name) })
	for _, v := range s.units {
		if i := slices.IndexFunc(s.units, func(h *service) bool { return h.Holds && h.Name == v.Inside }); i >= 0 {
			v.holder = s.units[i]
		}
	}
	var f console.First
	s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	f.Try("epoll", err)
	s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	f.Try("eventfd", err)
	s.watch(s.wake, unix.EPOLLIN, s.reap)
	f.Try("control socket", s.serve(socket))
	return s, f.Err
}

// Run starts the units that start by themselves and keeps units as they shall be, until somebody orders Reboot or PowerOff.
// Late units start when the others are up and prepare, which another goroutine runs, has returned.
func (s *Supervisor) Run(prepare func()) initctl.Verb {
	s.begin(prepare)
	s.loop(time.Time{}, func() bool { return s.order != 0 })
	return s.order
}

func (s *Supervisor) begin(prepare func()) {
	var prepared atomic.Bool
	s.start(false)
	s.loop(time.Now().Add(startLimit), func() bool {
		return s.order != 0 || !slices.ContainsFunc(s.units, func(v *service) bool { return v.state == Starting })
	})
	go func() {
		prepare()
		prepared.Store(true)
		s.nudge()
	}()
	s.loop(time.Time{}, func() bool { return s.order != 0 || prepared.Load() })
	s.next = time.Time{} // it changed what is reported
	s.start(true)
}

func (s *Supervisor) start(late bool) {
	for _, v := range s.units {
		if v.Autostart && v.Late == late && s.order == 0 {
			s.happen(v, Start)
		}
	}
}

// nudge wakes the loop. Any goroutine may call it.
func (s *Supervisor) nudge() { unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// Drain stops units for good and returns the names of those that had not ended when the time was up. From the first call on,
// no unit is started any more.
func (s *Supervisor) Drain(names []string) (stuck []string) {
	s.halting = true
	var left []*service
	limit := time.Duration(0)
	for _, v := range s.units {
		if slices.Contains(names, v.Name) {
			s.happen(v, Stop)
			left = append(left, v)
			limit = max(limit, v.stopTime())
		}
	}
	s.loop(time.Now().Add(limit+killAgain), func() bool {
		left = slices.DeleteFunc(left, func(v *service) bool { return v.state == Down })
		return len(left) == 0
	})
	for _, v := range left {
		stuck = append(stuck, v.Name)
	}
	return stuck
}

// loop waits for all there is to wait for, until done or the deadline, if there is one.
func (s *Supervisor) loop(deadline time.Time, done func() bool) {
	var events [16]unix.EpollEvent
	for {
		now := time.Now()
		next := s.timers(now)
		s.tell()
		if done() || !deadline.IsZero() && now.After(deadline) {
			return
		}
		n, _ := unix.EpollWait(s.epoll, events[:], int(max(0, next.Sub(now).Milliseconds()+1)))
		for _, e := range events[:max(n, 0)] {
			if do := s.on[int(e.Fd)]; do != nil { // an earlier event of this round may have closed it
				do()
			}
		}
	}
}

// timers lets happen what is due and returns when to come again.
func (s *Supervisor) timers(now time.Time) (next time.Time) {
	if !now.Before(s.look) {
		s.look = now.Add(lookSeldom)
		for _, v := range s.units {
			if v.log.relieve(v.Name) {
				s.look = now.Add(lookOften)
			}
		}
		s.feed()
		if !now.Before(s.next) {
			s.next = now.Add(reportPause)
			s.report()
		}
		s.guard(now)
		s.hostname.follow()
	}
	next = s.look
	for _, v := range s.units {
		if !v.timer.IsZero() && !now.Before(v.timer) {
			v.timer = time.Time{}
			s.happen(v, Timer)
		}
		if !v.timer.IsZero() && v.timer.Before(next) {
			next = v.timer
		}
	}
	return next
}

// happen is the one place where a unit's state changes.
func (s *Supervisor) happen(v *service, e Event) {
	c, ok := table[v.state][e]
	if !ok || s.halting && c.do == Spawn {
		return
	}
	before, now := v.state, time.Now()
	if c.do == Spawn && v.holder != nil && v.holder.state != Up { // nothing failed: it is its holder's turn
		c, v.timer = cell{Waiting, None}, now.Add(firstPause)
	}
	if v.state = c.next; before != v.state {
		v.since = now
	}
	switch {
	case v.state == Up:
		v.timer, v.up = time.Time{}, now
		v.say("up in " + console.Seconds(now.Sub(v.began)))
	case v.state == Down:
		v.timer, v.failures = time.Time{}, 0
		if before == Stopping || before == Waiting {
			v.say("stopped, " + v.record().Ending())
		} else {
			v.say(v.record().Ending() + ", not started again")
		}
	case c.do == Spawn:
		s.spawn(v, now)
	case c.do == Term:
		s.kernel.kill(v, unix.SIGTERM)
		v.timer = now.Add(v.stopTime())
	case c.do == Kill:
		if !v.hangs {
			v.say([...]string{Starting: "not ready in time", Stopping: "does not stop", Cycling: "does not stop"}[before] + ", killing it")
		}
		s.kernel.kill(v, unix.SIGKILL)
		v.hangs, v.timer = true, now.Add(killAgain)
	case c.do == Pause && before == Cycling: // somebody asked for it
		v.timer = now
	case c.do == Pause:
		life, wait := time.Duration(0), time.Duration(0)
		if before == Up {
			life = now.Sub(v.up)
		}
		wait, v.failures = pause(life, v.failures)
		v.timer = now.Add(wait)
		v.restarts++
		v.say(v.record().Ending() + ", again in " + console.Seconds(wait))
	}
	s.changed(v)
}

// say tells people about the unit. Of failures in a row it tells the first, second, fourth, eighth ...
func (v *service) say(what string) {
	if v.failures > 1 {
		what += " (" + strconv.Itoa(v.failures) + " failures in a row)"
	}
	if v.failures&(v.failures-1) == 0 {
		console.Say("unit ", v.Name, ": ", what)
	}
}

// spawn makes the unit's process; the unit is Starting.
func (s *Supervisor) spawn(v *service, now time.Time) {
	v.began, v.timer, v.hangs = now, time.Time{}, false
	ready := [2]int{-1, -1}
	var err error
	if v.NotifyReady {
		err = unix.Pipe2(ready[:], unix.O_CLOEXEC|unix.O_NONBLOCK)
	}
	if err == nil {
		v.pid, err = s.kernel.spawn(v, ready[1])
	}
	unix.Close(ready[1])
	v.ready = ready[0]
	switch {
	case err != nil:
		var errno unix.Errno
		errors.As(err, &errno)
		s.ended(v, initctl.NotStarted, uint8(errno))
	case v.NotifyReady:
		if v.StartTimeout > 0 {
			v.timer = now.Add(v.StartTimeout)
		}
		s.watch(v.ready, unix.EPOLLIN, func() { s.hear(v) })
	case v.told > 0: // it is ready when its process is known
	default:
		s.happen(v, Ready)
	}
}

// hear reads a unit's ready pipe.
func (s *Supervisor) hear(v *service) {
	var b [16]byte
	n, err := unix.Read(v.ready, b[:])
	if err != nil {
		return
	}
	s.forget(v.ready)
	v.ready = -1
	if bytes.IndexByte(b[:n], '\n') >= 0 {
		s.happen(v, Ready)
	}
}

// reap takes note of every process that has ended, orphans of others included.
func (s *Supervisor) reap() {
	var b [8]byte
	unix.Read(s.wake, b[:])
	for range reapAtOnce {
		pid, status := s.kernel.wait()
		if pid <= 0 {
			return
		}
		for _, v := range s.units {
			// Its trampoline said it before it ended, and until then nobody is told of the other's end.
			if v.learn() && !v.NotifyReady {
				s.happen(v, Ready)
			}
			if v.pid == pid && status.Signaled() {
				s.ended(v, initctl.Killed, uint8(status.Signal()))
			} else if v.pid == pid {
				s.ended(v, initctl.Exited, uint8(status.ExitStatus()))
			}
		}
	}
	s.nudge() // there may be more: after the others' turn, for who forks without end must not have PID 1 to himself
}

func (s *Supervisor) ended(v *service, how, value uint8) {
	if v.ready >= 0 {
		s.forget(v.ready)
	}
	if v.told > 0 {
		unix.Close(v.told)
	}
	v.ready, v.told, v.pid, v.end, v.value = -1, 0, 0, how, value
	s.kernel.sweep(v)
	s.happen(v, ended(v.Restart, how, value))
}

func (v *service) stopTime() time.Duration {
	if v.StopTimeout == 0 {
		return stopTimeout
	}
	return v.StopTimeout
}
