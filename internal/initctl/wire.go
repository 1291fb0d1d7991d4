// Package initctl is PID 1's control socket: the messages, which both sides encode and decode here, and the client.
//
// The socket is SOCK_SEQPACKET, so a message is a packet, and every packet has the one size of its direction. A request names
// a verb and a unit, never a command line. PID 1 links this package: it may import nothing but the standard library and x/sys,
// and nothing large of that (no fmt, no net).
package initctl

import (
	"encoding/binary"
	"errors"
	"strconv"
	"syscall"
)

// A Verb is what a request asks for.
type Verb uint8

// The verbs; there are never more than eight. Who may use which is decided by PID 1 from SO_PEERCRED.
const (
	Start    Verb = 1 + iota // owners of the unit, machined, root
	Stop                     // the same
	Restart                  // the same
	List                     // everybody; one record for each unit
	Follow                   // everybody; one record for each unit now, then one after every change
	Logs                     // machined; the answer carries the read end of the unit's log pipe
	Reboot                   // machined
	PowerOff                 // machined
)

// needsUnit says whether a request of this verb names a unit; the others must name none.
func (v Verb) needsUnit() bool { return v <= Restart || v == Logs }

// A Code is how PID 1 answered. It is the error that Client returns, except for OK.
type Code uint8

// The codes of an answer. After Invalid, PID 1 closes the connection.
const (
	OK       Code = iota
	Invalid       // not a message of this package
	Denied        // the caller's user may not do this
	NotFound      // no unit of that name
	Halting       // the machine is going down: nothing is started any more
	Busy          // too many connections
	codes
)

func (c Code) Error() string {
	return "init: " + [...]string{"ok", "the message is malformed", "this user may not do that", "no such unit",
		"the machine is going down", "too many connections", "unknown answer"}[min(c, codes)]
}

// How a unit's last process ended.
const (
	NeverEnded uint8 = iota
	Exited           // Value is its exit code
	Killed           // Value is the signal
	NotStarted       // Value is the errno of the fork
	Exhausted        // by the kernel, because the unit had reached its memory limit; Value is the signal
	endings
)

// MemoryLimit is what Ending says of a unit that was Exhausted.
const MemoryLimit = "killed by SIGKILL: it ran into its memory limit"

// States, as numbers on the wire; the order is that of Status.State's texts.
var states = [...]string{"down", "starting", "up", "stopping", "cycling", "waiting"}

// Sizes of the two kinds of message, in bytes.
const (
	nameSize    = 32 // with at least one NUL
	RequestSize = 8 + nameSize
	RecordSize  = 24 + nameSize
)

// ErrMalformed is returned by both decoders.
var ErrMalformed = errors.New("initctl: malformed message")

// A Request is one packet to PID 1.
type Request struct {
	Verb Verb
	Unit string
}

// Encode returns the request's packet. A unit's name too long for one is cut, and thereby names no unit.
func (r Request) Encode() (p [RequestSize]byte) {
	p[0] = byte(r.Verb)
	copy(p[8:RequestSize-1], r.Unit)
	return p
}

// DecodeRequest accepts exactly what Encode returns for a verb and a name that exist.
func DecodeRequest(p []byte) (Request, error) {
	if len(p) != RequestSize || !zero(p[1:8]) {
		return Request{}, ErrMalformed
	}
	name, ok := decodeName(p[8:])
	r := Request{Verb: Verb(p[0]), Unit: name}
	if !ok || r.Verb < Start || r.Verb > PowerOff || (name != "") != r.Verb.needsUnit() {
		return Request{}, ErrMalformed
	}
	return r, nil
}

// A Record is one packet from PID 1: an answer's code and, if it is OK, a unit.
type Record struct {
	Code     Code
	State    uint8 // index of the state's text: down, starting, up, stopping, cycling, waiting
	End      uint8 // NeverEnded, Exited, Killed, NotStarted or Exhausted
	Value    uint8 // see End
	PID      uint32
	Restarts uint32
	Left     uint32 // how many records of this answer still follow
	Since    int64  // wall time of the last change of State, in nanoseconds since 1970
	Unit     string
}

// Encode returns the record's packet.
func (r Record) Encode() (p [RecordSize]byte) {
	p[0], p[1], p[2], p[3] = byte(r.Code), r.State, r.End, r.Value
	binary.LittleEndian.PutUint32(p[4:], r.PID)
	binary.LittleEndian.PutUint32(p[8:], r.Restarts)
	binary.LittleEndian.PutUint32(p[12:], r.Left)
	binary.LittleEndian.PutUint64(p[16:], uint64(r.Since))
	copy(p[24:RecordSize-1], r.Unit)
	return p
}

// DecodeRecord accepts exactly what Encode returns for values that exist.
func DecodeRecord(p []byte) (Record, error) {
	if len(p) != RecordSize {
		return Record{}, ErrMalformed
	}
	name, ok := decodeName(p[24:])
	r := Record{
		Code: Code(p[0]), State: p[1], End: p[2], Value: p[3],
		PID:      binary.LittleEndian.Uint32(p[4:]),
		Restarts: binary.LittleEndian.Uint32(p[8:]),
		Left:     binary.LittleEndian.Uint32(p[12:]),
		Since:    int64(binary.LittleEndian.Uint64(p[16:])),
		Unit:     name,
	}
	if !ok || r.Code >= codes || int(r.State) >= len(states) || r.End >= endings {
		return Record{}, ErrMalformed
	}
	return r, nil
}

// Ending is how the last process ended, for people: "", "exit 1", "killed by SIGKILL", "not started: no such file or directory",
// "killed by SIGSYS: a system call that its unit does not allow".
func (r Record) Ending() string {
	switch r.End {
	case Exited:
		if r.Value == 126 { // unit.NotConfined
			return "exit 126: it could not be confined"
		}
		return "exit " + strconv.Itoa(int(r.Value))
	case Killed:
		return "killed by " + signalName(r.Value)
	case Exhausted:
		return MemoryLimit
	case NotStarted:
		return "not started: " + syscall.Errno(r.Value).Error()
	}
	return ""
}

// signalName is like unix.SignalName, without the table of every signal.
func signalName(n uint8) string {
	switch syscall.Signal(n) {
	case syscall.SIGHUP:
		return "SIGHUP"
	case syscall.SIGINT:
		return "SIGINT"
	case syscall.SIGQUIT:
		return "SIGQUIT"
	case syscall.SIGILL:
		return "SIGILL"
	case syscall.SIGTRAP:
		return "SIGTRAP"
	case syscall.SIGABRT:
		return "SIGABRT"
	case syscall.SIGBUS:
		return "SIGBUS"
	case syscall.SIGFPE:
		return "SIGFPE"
	case syscall.SIGKILL:
		return "SIGKILL"
	case syscall.SIGSEGV:
		return "SIGSEGV"
	case syscall.SIGSYS:
		return "SIGSYS: a system call that its unit does not allow"
	case syscall.SIGPIPE:
		return "SIGPIPE"
	case syscall.SIGALRM:
		return "SIGALRM"
	case syscall.SIGTERM:
		return "SIGTERM"
	}
	return "signal " + strconv.Itoa(int(n))
}

func decodeName(p []byte) (string, bool) {
	n := 0
	for n < len(p) && p[n] != 0 {
		n++
	}
	return string(p[:n]), n < len(p) && zero(p[n:])
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
