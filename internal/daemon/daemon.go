// Package daemon starts a daemon as docs/node.md says, and serves its Unix socket.
//
// Main is the only code in the tree that catches signals or exits. It knows nothing of what the daemon does.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Env is what a daemon gets from PID 1. Everything in it lives as long as the process.
type Env struct {
	Name string
	// Log is required; it goes to the log pipe.
	Log *slog.Logger
	// Listen is the daemon's Unix socket, bound by PID 1.
	Listen net.Listener
	// TCP is the daemon's TCP listener; nil for daemons without one.
	TCP net.Listener
	// Console is /dev/console; nil unless the unit asks for it.
	Console *os.File
	// Ready tells PID 1 that the daemon serves. More than one call is one. May be called by any goroutine. Never nil.
	Ready func()
	// Metrics is the daemon's set of figures.
	Metrics *metrics.Set
	// Who tells the user behind a connection; nil means the kernel's word (SO_PEERCRED). Only tests set it.
	Who func(net.Conn) (uid.ID, error)
}

// Main runs a daemon until it fails or SIGTERM comes, and exits the process.
func Main(name string, run func(context.Context, Env) error) {
	log := NewLog(os.Stderr, name)
	env, err := inherit(name, log)
	if err != nil {
		log.Error("cannot start", "err", err.Error())
		os.Exit(unit.DoNotRestart)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	go seal(ctx, log)
	err = run(ctx, env)
	stopped := ctx.Err() != nil
	stop()
	if err != nil && !(stopped && errors.Is(err, context.Canceled)) {
		log.Error("ended", "err", err.Error())
		os.Exit(1)
	}
}

// NewLog returns a logger of JSON lines with the daemon's name. Level debug if BULKHEAD_DEBUG is set.
func NewLog(w *os.File, name string) *slog.Logger {
	level := slog.LevelInfo
	if os.Getenv("BULKHEAD_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})).With("daemon", name)
}

// inherit takes over the descriptors named in BULKHEAD_FDS.
func inherit(name string, log *slog.Logger) (Env, error) {
	env := Env{Name: name, Log: log, Metrics: metrics.New(name)}
	fds, ok := os.LookupEnv("BULKHEAD_FDS")
	if !ok {
		return env, fmt.Errorf("BULKHEAD_FDS is not set: %s is started by PID 1, not by hand", name)
	}
	ready := os.NewFile(3, "ready")
	var once sync.Once
	env.Ready = func() {
		once.Do(func() {
			_, err := ready.Write([]byte{'\n'})
			if err = errors.Join(err, ready.Close()); err != nil {
				log.Error("ready", "err", err.Error())
			}
		})
	}
	syscall.CloseOnExec(3)
	for i, what := range strings.Split(fds, ",") {
		if what == "" {
			continue
		}
		fd := unit.FirstListener + i
		syscall.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), what)
		if what == "console" {
			env.Console = f
			continue
		}
		l, err := net.FileListener(f) // duplicates the descriptor
		if err = errors.Join(err, f.Close()); err != nil {
			return env, fmt.Errorf("descriptor %d (%s): %w", fd, what, err)
		}
		if ul, ok := l.(*net.UnixListener); ok {
			ul.SetUnlinkOnClose(false) // the socket belongs to PID 1
			env.Listen = l
		} else {
			env.TCP = l
		}
	}
	return env, nil
}
