package kubeletd

import (
	"context"
	"errors"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/vip"
)

// keepVirtual takes part in who has the cluster's virtual addresses, as long as the document has some and this node is a control plane.
func (d *Daemon) keepVirtual(ctx context.Context) error {
	k, err := vip.New(vip.Config{
		Store: d.cfg.Store, Network: d.cfg.Virtual, Log: d.cfg.Env.Log, Metrics: d.cfg.Env.Metrics,
		Healthy: func(context.Context) error { return d.ownAPIServer() },
	})
	if err != nil {
		return err
	}
	return k.Run(ctx, func() vip.Want {
		s, _ := d.loop.Spec()
		if s.Role != config.ControlPlane {
			return vip.Want{}
		}
		return vip.Want{Node: s.Node, Addresses: s.VirtualIPs}
	})
}

// ownAPIServer says why this node's API server is not well; nil if it is. The balancer asks it every second.
func (d *Daemon) ownAPIServer() error {
	for _, b := range d.kernel.balancer.State().Backends {
		switch {
		case !b.Preferred:
		case b.Up:
			return nil
		case b.Error != "":
			return errors.New(b.Error)
		}
	}
	return errors.New("it was not asked yet")
}
