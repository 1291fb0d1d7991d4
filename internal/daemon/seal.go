package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/landlock"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// volumeLook is the time between two looks at whether the unit's volume is there.
const volumeLook = 250 * time.Millisecond

// seal puts the unit's own rules for files on this process as soon as all is there that they name below the unit's volume (unit.Volume). PID 1 cannot: Landlock ties a rule
// to a folder that is there, and the volume is mounted when the daemon runs already. What cannot be sealed ends: PID 1 says why, and starts it anew.
func seal(ctx context.Context, log *slog.Logger) {
	volume, text := os.Getenv(unit.VolumeEnv), os.Getenv(unit.RulesEnv)
	if volume == "" {
		return // all of its rules are in force
	}
	rules, err := landlock.Parse(text)
	if err == nil {
		if err = mounted(ctx, volume, rules); err != nil {
			return // it ends before
		}
		err = restrict(rules)
	}
	if err != nil {
		log.Error("it could not be confined", "err", err.Error())
		os.Exit(unit.NotConfined)
	}
	log.Info("confined to its files", "volume", volume)
}

// mounted waits until all is there that rules name below a folder; it returns ctx's error.
func mounted(ctx context.Context, volume string, rules []unit.Rule) error {
	t := time.NewTicker(volumeLook)
	defer t.Stop()
	for {
		there := true
		for _, r := range rules {
			if strings.HasPrefix(r.Path, volume+"/") {
				_, err := os.Lstat(r.Path)
				there = there && err == nil
			}
		}
		if there {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// restrict puts rules for files on all threads of this process.
func restrict(rules []unit.Rule) error {
	set, err := landlock.Ruleset([3]uint64{landlock.Files}, rules)
	if err != nil {
		return err
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(set), 0, 0)
	if err = unix.Close(set); errno != 0 {
		err = errors.Join(os.NewSyscallError("restrict files", errno), err)
	}
	return err
}
