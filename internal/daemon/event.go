package daemon

import (
	"encoding/json"
	"log/slog"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Types of events that daemons tell by Tell.
const (
	EventAccess  = "access"  // who was refused, and why
	EventCluster = "cluster" // nodes that came, went, or were refused
)

// tellMessage is the message of a log line that machined keeps as an event too, under the name of the daemon whose pipe it came through.
const tellMessage = "event"

// Bounds of an event, in bytes.
const (
	maxType  = 32
	maxAbout = 120
	maxText  = 1000
)

// Told is an event in a daemon's log.
type Told struct {
	Type  string // one word, for example EventAccess
	About string // what happens again if it is the same; machined tells it once an hour. At most 120 bytes
	Text  string // one sentence. At most 1000 bytes
}

// Tell writes an event into the daemon's log. It needs no connection and never fails; machined bounds how many are kept. about tells repeats from news, and must
// not hold what strangers choose: of one that was told a short while ago only the count is kept.
func Tell(log *slog.Logger, kind, about, text string) {
	log.Info(tellMessage, "type", kind, "about", printable(about, maxAbout), "text", printable(text, maxText))
}

// ReadTold returns the event that a line of a daemon's log is; ok is false if it is none. The line is believed in nothing: a daemon may have been broken into. It is pure.
func ReadTold(line string) (e Told, ok bool) {
	if !strings.Contains(line, `"msg":"`+tellMessage+`"`) { // most lines: without parsing
		return Told{}, false
	}
	var l struct{ Msg, Type, About, Text string }
	if json.Unmarshal([]byte(line), &l) != nil || l.Msg != tellMessage || l.Type == "" || l.Text == "" || len(l.Type) > maxType || printable(l.Type, maxType) != l.Type || strings.Contains(l.Type, " ") {
		return Told{}, false
	}
	return Told{l.Type, printable(l.About, maxAbout), printable(l.Text, maxText)}, true
}

// printable makes a text fit for one line of a list, with nothing in it that a terminal would obey.
func printable(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	for len(s) > most {
		_, size := utf8.DecodeLastRuneInString(s[:most])
		s = s[:most-size]
	}
	return s
}
