package machined

import (
	"context"
	"time"
)

// restartPause is between the word and the deed, so that who watches sees it, and between two tries.
const restartPause = 3 * time.Second

// heed restarts the machine when storaged says that this is due: when the system was copied to a disk that it is to run from. What must be
// found there comes first: the generation, and trustd's keys. It returns ctx's error.
func (d *Daemon) heed(ctx context.Context) error {
	disks, keys := d.hand(storaged), d.hand("trustd")
	for {
		now, applied := d.running.Get()
		s, told := disks.status.Get()
		k, settled := keys.status.Get()
		if why := s.state.GetRestart(); why != "" && reached(s, now.Number) && reached(k, now.Number) && k.state.GetConverged() {
			d.events.say("machined", typePower, "restart: "+why)
			d.cfg.Log.Info("power order", "step", "restart: "+why)
			if err := pause(ctx, restartPause); err != nil {
				return err
			}
			d.noteOrder("restart: " + why)
			if err := d.cfg.init.Reboot(); err != nil {
				d.cfg.Log.Error("no restart", "err", err.Error())
				if err := pause(ctx, restartPause); err != nil {
					return err
				}
				continue
			}
			<-ctx.Done()
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-applied:
		case <-told:
		case <-settled:
		}
	}
}

// reached reports whether a daemon works towards the generation that runs.
func reached(s status, number uint64) bool {
	return s.here && s.refused == "" && number > 0 && s.state.GetGeneration() == number
}
