package machined

import (
	"context"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// Types of events.
const (
	typeService = "service" // a unit changed its state
	typeConfig  = "config"  // a generation, or what a daemon made of it
	typePower   = "power"   // reboot and shutdown
	typeClock   = "clock"   // it is wrong, or right again
	// Those that daemons tell in their logs are in internal/daemon.
)

const (
	maxEvents = 1000 // that can be asked for
	// maxEventText bounds a text, in bytes, so that one segment of the log holds maxEvents of them.
	maxEventText = 400
)

// events is a log whose lines are source, type and text with tabs between them.
type events struct{ log *logs.Log }

func openEvents(path string) (*events, error) {
	l, err := logs.Open(path)
	return &events{l}, err
}

// say adds an event. It never fails: there would be nobody to tell.
func (e *events) say(source, kind, text string) {
	e.log.Append(time.Now(), source+"\t"+kind+"\t"+logs.Cut(text, maxEventText))
}

// last returns when the newest event was; the zero time if there is none.
func (e *events) last(ctx context.Context) (t time.Time, err error) {
	err = e.log.Stream(ctx, 1, false, func(l logs.Line) error { t = l.Time; return nil })
	return t, err
}

// stream sends events as logs.Log.Stream sends lines.
func (e *events) stream(ctx context.Context, tail uint32, follow bool, send func(*machinev1.Event) error) error {
	if tail == 0 || tail > maxEvents {
		tail = maxEvents
	}
	return e.log.Stream(ctx, tail, follow, func(l logs.Line) error {
		ev := strings.SplitN(l.Text, "\t", 3)
		if len(ev) != 3 {
			ev = []string{"machined", "lost", l.Text} // the log's own word on lines that are gone
		}
		return send(&machinev1.Event{Time: timestamppb.New(l.Time), Source: ev[0], Type: ev[1], Text: ev[2]})
	})
}
