package updated

import (
	"context"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	"github.com/bulkhead-os/bulkhead/internal/keyservice"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// relayCallers says who may have keys fetched: storaged opens volumes by servers in the network, and has no network.
var relayCallers = peer.List{keysv1.Relay_ServiceDesc.ServiceName: {uid.Storaged}}

// relayServer makes calls to key services for storaged. It keeps nothing and knows no disk: what passes through it opens nothing alone.
type relayServer struct {
	keysv1.UnimplementedRelayServer
}

func (relayServer) Seal(ctx context.Context, r *keysv1.RelaySealRequest) (*keysv1.SealResponse, error) {
	return keyservice.Seal(ctx, r.GetServer(), r.GetPlaintext())
}

func (relayServer) Unseal(ctx context.Context, r *keysv1.RelayUnsealRequest) (*keysv1.UnsealResponse, error) {
	return keyservice.Unseal(ctx, r.GetServer(), r.GetSealed())
}
