package supervise

import (
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// A State is where a unit stands. The numbers are those of initctl.Record.
type State uint8

// A unit has a process in Starting, Up, Stopping and Cycling, and in no other state.
const (
	Down State = iota
	Starting
	Up
	Stopping // ends, and stays down
	Cycling  // ends, and is started again
	Waiting  // for the end of its pause
)

// An Event is what happens to a unit.
type Event uint8

// Exit and Done are the end of the process: Done if the unit must not be started again by itself.
const (
	Start Event = iota
	Stop
	Ready
	Exit
	Done
	Timer
)

// An Action is what an event makes the supervisor do.
type Action uint8

// Term and Kill are the signals; Pause sets the timer for the restart.
const (
	None Action = iota
	Spawn
	Term
	Kill
	Pause
)

type cell struct {
	next State
	do   Action
}

// table is all policy about processes. A missing entry ignores the event.
var table = map[State]map[Event]cell{
	Down:     {Start: {Starting, Spawn}},
	Starting: {Ready: {Up, None}, Stop: {Stopping, Term}, Exit: {Waiting, Pause}, Done: {Down, None}, Timer: {Starting, Kill}},
	Up:       {Stop: {Stopping, Term}, Exit: {Waiting, Pause}, Done: {Down, None}},
	Stopping: {Start: {Cycling, None}, Exit: {Down, None}, Done: {Down, None}, Timer: {Stopping, Kill}},
	Cycling:  {Stop: {Stopping, None}, Exit: {Waiting, Pause}, Done: {Waiting, Pause}, Timer: {Cycling, Kill}},
	Waiting:  {Stop: {Down, None}, Timer: {Starting, Spawn}},
}

// How long a unit must have been up for its past to be forgotten, and the shortest and longest pause before a restart.
const (
	healthy    = 10 * time.Second
	firstPause = 100 * time.Millisecond
	lastPause  = 10 * time.Second
)

// pause is how long a unit waits for its restart after being up for life, with its count of failures in a row before and after.
func pause(life time.Duration, failures int) (time.Duration, int) {
	if life >= healthy {
		return 0, 0
	}
	return min(firstPause<<min(failures, 16), lastPause), failures + 1
}

// ended turns the end of a process into an event.
func ended(policy string, how, value uint8) Event {
	switch {
	case policy == "never", how == initctl.Exited && value == unit.DoNotRestart, policy == "on-failure" && how == initctl.Exited && value == 0:
		return Done
	}
	return Exit
}
