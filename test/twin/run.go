package twin

import (
	"encoding/json"
	"errors"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Prefix begins each line that a twin writes into its log; what follows is a Line in JSON.
const Prefix = "twin "

// A Line is a part of what a twin found out.
type Line struct {
	Unit    string
	Stage   int
	Count   int               `json:",omitempty"` // how far it has come that ends the process
	Answers map[string]string `json:",omitempty"` // by ID
	Done    bool              `json:",omitempty"` // the stage's last line
}

// perLine bounds a line: machined cuts those of 16 KiB.
const perLine = 80

// A Twin is told which generation of the configuration the daemon has, and tries at its second (in the process that saw an earlier one) what is
// of the first stage, at its third what is of the second, and so on: so the host says when.
type Twin struct {
	name string

	mu    sync.Mutex
	first uint64 // guarded by mu; 0: none
	done  uint64 // guarded by mu; the newest stage that was begun
}

// New returns the twin of a unit.
func New(name string) *Twin { return &Twin{name: name} }

// Generation tells the twin; it returns at once. The process that is started anew gets the newest generation again, and that is no order.
func (t *Twin) Generation(n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first == 0 {
		t.first = n
		return
	}
	t.order(n)
}

// Order is Generation where every call is an order.
func (t *Twin) Order(n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.order(n)
}

func (t *Twin) order(n uint64) { // mu is held
	if stage := n - 1; n > 1 && n > t.first && n > t.done && stage <= Stages {
		t.done = n
		go t.try(int(stage))
	}
}

// try runs a stage's probes.
func (t *Twin) try(stage int) {
	var limit unix.Rlimit
	_ = unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &limit) // getrlimit is another system call, which no unit has
	e := &env{name: t.name, limit: limit.Cur, conns: map[string]*way{}}
	e.meet()
	answers := map[string]string{}
	flush := func(done bool) {
		t.say(Line{Unit: t.name, Stage: stage, Answers: answers, Done: done})
		answers = map[string]string{}
	}
	for _, p := range Probes() {
		if Stage(p.Group, t.name) != stage {
			continue
		}
		e.count = func(n int) { t.say(Line{Unit: t.name, Stage: stage, Count: n}) }
		answers[p.ID()] = e.try(p)
		if len(answers) == perLine {
			flush(false)
		}
	}
	e.close()
	flush(true)
}

// try runs a probe on a thread of its own, which ends with it: what was let through changed that thread and no other.
func (e *env) try(p Probe) string {
	answer := make(chan string, 1)
	go func() {
		runtime.LockOSThread()
		answer <- p.run(e)
	}()
	return <-answer
}

// Try runs the probes of Anywhere in this process, as a unit's, or those of them that are named, and returns the answers by ID.
func Try(name string, only ...string) map[string]string {
	e, out := &env{name: name}, map[string]string{}
	for _, p := range Anywhere() {
		if len(only) == 0 || slices.Contains(only, p.ID()) {
			out[p.ID()] = e.try(p)
		}
	}
	return out
}

func (t *Twin) say(l Line) {
	text, err := json.Marshal(l)
	if err != nil {
		panic("twin: " + err.Error()) // strings and numbers
	}
	_, _ = os.Stderr.WriteString(Prefix + string(text) + "\n")
}

func itoa(n int) string { return strconv.Itoa(n) }

func errnoOf(err error) (unix.Errno, bool) {
	var e syscall.Errno
	return e, errors.As(err, &e)
}
