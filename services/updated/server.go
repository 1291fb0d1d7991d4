package updated

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// server is update.v1 for clients.
type server struct {
	updatev1.UnimplementedUpdateServer
	d *Daemon
}

// Limits of a request.
const (
	maxCA     = 64 << 10 // bytes
	maxSecret = 4 << 10
	maxDevice = 128
	tellTime  = 200 * time.Millisecond // between two messages of progress
)

// caller names who stands behind a call.
func caller(ctx context.Context) string {
	if c := peer.CallerFrom(ctx); c.Name != "" {
		return c.Name
	}
	return "unknown"
}

// source makes the source that a request names.
func (s *server) source(r *updatev1.UpgradeRequest) (source, error) {
	if len(r.GetCa()) > maxCA || len(r.GetUsername()) > maxSecret || len(r.GetPassword()) > maxSecret {
		return nil, errs.New(errs.Invalid, "ca, username, password: at most %d, %d and %d bytes are allowed", maxCA, maxSecret, maxSecret)
	}
	if n := len(r.GetMedia()); n > maxDevice {
		return nil, errs.New(errs.Invalid, "media: %d bytes; a device like /dev/sdb has at most %d", n, maxDevice)
	}
	switch {
	case r.GetOci() != "":
		return newRegistry(r.GetOci(), r.GetCa(), r.GetUsername(), r.GetPassword(), architecture)
	case r.GetUrl() != "":
		return newWeb(r.GetUrl(), r.GetCa())
	case r.GetMedia() != "":
		return &medium{s.d.cfg.Slots, r.GetMedia()}, nil
	}
	return nil, errs.New(errs.Invalid, "source: one of oci, url and media is needed")
}

func (s *server) Upgrade(r *updatev1.UpgradeRequest, out grpc.ServerStreamingServer[updatev1.UpgradeProgress]) error {
	src, err := s.source(r)
	if err != nil {
		return err
	}
	return s.upgrade(out.Context(), src, out.Send)
}

func (s *server) Upload(stream grpc.BidiStreamingServer[updatev1.UploadRequest, updatev1.UploadResponse]) error {
	var mu sync.Mutex // one message at a time
	u := newUpload(stream)
	u.send = func(m *updatev1.UploadResponse) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(m)
	}
	return s.upgrade(stream.Context(), u, func(p *updatev1.UpgradeProgress) error {
		return u.send(&updatev1.UploadResponse{Progress: p})
	})
}

// upgrade runs a job and sends its progress: the newest, a few times a second.
func (s *server) upgrade(ctx context.Context, src source, send func(*updatev1.UpgradeProgress) error) error {
	d := s.d
	select {
	case d.busy <- struct{}{}:
		defer func() { // in this order: who sees no upgrade can begin one
			<-d.busy
			d.progress.Set(nil)
			d.publish()
		}()
	default:
		return errs.New(errs.Conflict, "an upgrade runs already")
	}
	by := caller(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.log.Info("upgrade begins", "step", src.String())
	j := &job{slots: d.cfg.Slots, keys: d.cfg.Keys, limits: d.cfg.limits, now: time.Now, tell: func(p *updatev1.UpgradeProgress) {
		was, _ := d.progress.Get()
		if more := p.GetDoneBytes() - was.GetDoneBytes(); p.GetStep() == "fetch" && was.GetStep() == "fetch" && p.GetDoneBytes() > was.GetDoneBytes() {
			d.meters.fetched.Add(float64(more))
		}
		d.progress.Set(p)
	}}
	var version string
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		version, err = j.run(ctx, src)
	}()
	sendErr := s.follow(ctx, done, send)
	cancel() // if the caller is gone, the job ends
	<-done
	last, _ := d.progress.Get()
	d.finish(src, by, version, err)
	if err == nil && sendErr == nil {
		sendErr = send(last)
	}
	if err != nil {
		return err
	}
	return sendErr
}

// follow sends progress until done is closed or the caller is gone.
func (s *server) follow(ctx context.Context, done <-chan struct{}, send func(*updatev1.UpgradeProgress) error) error {
	t := time.NewTicker(tellTime)
	defer t.Stop()
	var last *updatev1.UpgradeProgress
	for {
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		p, _ := s.d.progress.Get()
		if p == nil || p == last {
			continue
		}
		last = p
		s.d.publish()
		if err := send(p); err != nil {
			return err
		}
	}
}

// finish notes what became of an upgrade.
func (d *Daemon) finish(src source, by, version string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTime) // the caller may be gone
	defer cancel()
	d.changed.Store(true)
	if err != nil {
		d.meters.upgrades.Add(1, "failed")
		d.log.Warn("upgrade failed", "err", errs.Text(err))
		d.tell(ctx, fmt.Sprintf("upgrade from %s by %s: %s", src, by, errs.Text(err)))
	} else {
		d.meters.upgrades.Add(1, "done")
		d.log.Info("upgrade done", "step", version)
		d.book.add(event{Time: time.Now(), What: "installed", Version: version, By: by, Detail: "from " + src.String()}, nil)
		d.tell(ctx, fmt.Sprintf("%s was installed by %s from %s; the next boot tries it", version, by, src))
	}
	d.loop.Wake()
}

func (s *server) GetStatus(context.Context, *updatev1.GetStatusRequest) (*updatev1.Status, error) {
	s.d.publish()
	st, _ := s.d.status.Get()
	return st, nil
}

func (s *server) WatchStatus(_ *updatev1.WatchStatusRequest, out grpc.ServerStreamingServer[updatev1.Status]) error {
	return s.d.status.Watch(out.Context(), out.Send)
}

func (s *server) MarkGood(ctx context.Context, _ *updatev1.MarkGoodRequest) (*updatev1.MarkGoodResponse, error) {
	if err := s.d.markGood(ctx, true, caller(ctx)); err != nil {
		return nil, err
	}
	s.d.loop.Wake()
	st, err := s.d.cfg.Slots.Get(ctx, &slotv1.GetRequest{})
	return &updatev1.MarkGoodResponse{Version: State{Slots: st}.running().GetVersion()}, err
}

func (s *server) Rollback(ctx context.Context, _ *updatev1.RollbackRequest) (*updatev1.RollbackResponse, error) {
	select {
	case s.d.busy <- struct{}{}: // an upgrade would lose its slot
		defer func() { <-s.d.busy }()
	default:
		return nil, errs.New(errs.Conflict, "an upgrade runs; end it first")
	}
	was, _ := s.d.state.Get()
	r, err := s.d.cfg.Slots.Rollback(ctx, &slotv1.RollbackRequest{})
	s.d.changed.Store(true)
	s.d.loop.Wake()
	if err != nil {
		return nil, err
	}
	by, detail := caller(ctx), "cancelled before its first try"
	if r.GetRestart() {
		detail = "after the next restart"
		s.d.quit.Store(was.onTrial())
	}
	s.d.book.add(event{Time: time.Now(), What: "rollback", Version: r.GetVersion(), By: by, Detail: detail}, nil)
	s.d.tell(ctx, fmt.Sprintf("rollback to %s by %s", r.GetVersion(), by))
	return &updatev1.RollbackResponse{Version: r.GetVersion(), Restart: r.GetRestart()}, nil
}
