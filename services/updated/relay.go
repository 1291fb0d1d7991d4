package updated

import (
	"context"
	"strings"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/keyservice"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// callers are those besides apid. A method's own entry goes before its service's, so that apid stands there too.
var callers = peer.List{
	keysv1.Relay_ServiceDesc.ServiceName:     {uid.Storaged},           // it opens volumes by servers in the network, and has no network
	updatev1.Update_GetStatus_FullMethodName: {uid.Apid, uid.Machined}, // which tells the cluster what lies ready here
}

// Callers is who may call what, besides apid and machined's Control: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers }

// relayServer makes calls to key services for storaged. It keeps nothing and knows no disk: what passes through it opens nothing alone.
type relayServer struct {
	keysv1.UnimplementedRelayServer
}

func (relayServer) Seal(ctx context.Context, r *keysv1.RelaySealRequest) (*keysv1.SealResponse, error) {
	a, err := keyservice.Seal(ctx, r.GetServer(), r.GetPlaintext())
	return a, refusal(err)
}

func (relayServer) Unseal(ctx context.Context, r *keysv1.RelayUnsealRequest) (*keysv1.UnsealResponse, error) {
	a, err := keyservice.Unseal(ctx, r.GetServer(), r.GetSealed())
	return a, refusal(err)
}

// refusal is what storaged is told, in words for people. It is nothing that storaged's connection to us should be tried again for: storaged
// itself asks again, for hours if need be.
func refusal(err error) error {
	if err == nil {
		return nil
	}
	text := errs.Text(err)
	if _, cause, ok := strings.Cut(text, "Error while dialing: "); ok { // grpc quotes it
		text = strings.TrimSuffix(cause, `"`)
	}
	return errs.New(errs.Precondition, "%s", text)
}
