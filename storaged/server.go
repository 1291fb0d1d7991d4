package storaged

import (
	"context"

	"google.golang.org/grpc"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
)

// server is storage.v1 for clients. It only reads.
type server struct {
	storagev1.UnimplementedStorageServer
	d *Daemon
}

// GetStatus looks now: what is free changes without any event.
func (s *server) GetStatus(ctx context.Context, _ *storagev1.GetStatusRequest) (*storagev1.Status, error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return nil, err
	}
	return status(have, s.d.loop.State()), nil
}

func (s *server) WatchStatus(_ *storagev1.WatchStatusRequest, out grpc.ServerStreamingServer[storagev1.Status]) error {
	return s.d.status.Watch(out.Context(), out.Send)
}
