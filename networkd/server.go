package networkd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
)

// server is network.v1.Network.
type server struct {
	networkv1.UnimplementedNetworkServer
	d *Daemon
}

func (s *server) GetStatus(ctx context.Context, _ *networkv1.GetStatusRequest) (*networkv1.Status, error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return nil, err
	}
	return s.d.describe(have), nil
}

func (s *server) WatchStatus(_ *networkv1.WatchStatusRequest, stream grpc.ServerStreamingServer[networkv1.Status]) error {
	return s.d.status.Watch(stream.Context(), stream.Send)
}

// control is control.v1.Control: the usual one, which also keeps the last spec. Without it a restarted networkd would fall back to the
// bare network until machined spoke to it, and static addresses would be gone for that long.
type control struct {
	reconcile.Control[Spec, State, Step]
	d *Daemon
}

func (c *control) SetSpec(ctx context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	out, err := c.Control.SetSpec(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := c.d.remember(r.GetSpec()); err != nil {
		return nil, err
	}
	return out, nil
}

const (
	fileSpec   = "spec.yaml"
	specHeader = "# generation "
)

// remember keeps the spec over restarts of the process; a boot forgets it. There are no secrets in it.
func (d *Daemon) remember(s *controlv1.Spec) error {
	path := filepath.Join(d.cfg.Dir, fileSpec)
	text := fmt.Sprintf("%s%d\n%s", specHeader, s.GetGeneration(), s.GetDocuments())
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return fmt.Errorf("keep spec: %w", err)
	}
	return os.Rename(path+".new", path)
}

// recall works towards the spec that an earlier process kept, if there is one. One that cannot be read is as good as none.
func (d *Daemon) recall() error {
	data, err := os.ReadFile(filepath.Join(d.cfg.Dir, fileSpec))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recall spec: %w", err)
	}
	head, documents, _ := strings.Cut(string(data), "\n")
	generation, err := strconv.ParseUint(strings.TrimPrefix(head, specHeader), 10, 64)
	var spec Spec
	if err == nil {
		spec, err = parse([]byte(documents), d.cfg.Hostname)
	}
	if err != nil || generation == 0 {
		d.log.Warn("kept spec ignored", "err", fmt.Sprint(err))
		return nil
	}
	return d.loop.Set(generation, spec)
}
