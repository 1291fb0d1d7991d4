package trustd

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// maxLookups bounds how many calls that show no known node's key may make etcd be read at once.
const maxLookups = 4

type nodesServer struct {
	trustv1.UnimplementedNodesServer
	d *Daemon
}

// caller is the node that calls: it holds the key that the cluster has on its list.
func (d *Daemon) caller(ctx context.Context, p *trustv1.NodeProof, payload []byte) (roster.Node, error) {
	n, err := d.proven(ctx, p, payload)
	if errs.Is(err, errs.Unauthenticated) || errs.Is(err, errs.Denied) {
		d.count.refusedNodes.Add(1)
		d.log.Warn("call of a node refused", "name", printable(p.GetName()), "address", printable(p.GetRemoteAddress()), "err", errs.Text(err))
		about := "unproven node"
		if errs.Is(err, errs.Denied) { // it has the key
			about = "refused node " + n.Name
		}
		daemon.Tell(d.log, daemon.EventCluster, about, fmt.Sprintf("a machine at %.60s that calls itself %.80q was refused: %s", p.GetRemoteAddress(), p.GetName(), errs.Text(err)))
		if err := d.delay(ctx); err != nil {
			return n, err
		}
	}
	return n, err
}

func (d *Daemon) proven(ctx context.Context, p *trustv1.NodeProof, payload []byte) (roster.Node, error) {
	list, _, err := d.roster()
	if err != nil {
		return roster.Node{}, err
	}
	address, err := roster.Address(p.GetRemoteAddress())
	if err != nil {
		return roster.Node{}, errs.New(errs.Invalid, "remote address: %w", err)
	}
	state, _ := d.list.Get()
	n, ok := holds(state, p, payload)
	if !ok { // it may have joined a moment ago at another control plane
		select {
		case d.lookups <- struct{}{}:
			defer func() { <-d.lookups }()
		case <-ctx.Done():
			return n, ctx.Err()
		}
		if state, err = list.Read(ctx); err != nil {
			return n, err
		}
		if n, ok = holds(state, p, payload); !ok {
			return n, errs.New(errs.Unauthenticated, "the cluster has no node called %.64q with this key: it was removed, or is of another cluster. Reset it and let it join again", p.GetName())
		}
	}
	instance := hex.EncodeToString(p.GetInstance())
	n, changed, err := n.Meet(instance, address)
	if err != nil || !changed {
		return n, err
	}
	if err = list.Meet(ctx, n, instance, address); errs.Is(err, errs.Denied) {
		return n, err
	} else if err != nil { // what it proves now is signed now, also if it cannot be written
		d.log.Warn("call of a node not kept", "name", n.Name, "address", address, "err", errs.Text(err))
	}
	return n, nil
}

// holds reports whether a proof was made with the key of the node that it names. It is pure.
func holds(s *roster.State, p *trustv1.NodeProof, payload []byte) (roster.Node, bool) {
	if s == nil {
		return roster.Node{}, false
	}
	n, ok := s.Nodes[p.GetName()]
	if !ok {
		return n, false
	}
	key, err := join.ParseKey(n.PublicKey)
	return n, err == nil && len(p.GetInstance()) == join.InstanceSize && join.Verify(key, p.GetChannelBinding(), payload, p.GetSignature())
}

func (s nodesServer) SignForNode(ctx context.Context, r *trustv1.SignForNodeRequest) (*trustv1.SignCertificateResponse, error) {
	d := s.d
	if len(r.GetCsr()) > maxRequest || len(r.GetProfile()) > 64 {
		return nil, errs.New(errs.Invalid, "the request has %d bytes and the profile's name %d; allowed are %d and 64", len(r.GetCsr()), len(r.GetProfile()), maxRequest)
	}
	n, err := d.caller(ctx, r.GetProof(), join.SignPayload(r.GetProof().GetInstance(), r.GetProfile(), r.GetCsr()))
	if err != nil {
		return nil, err
	}
	csr, err := parseRequest(r.GetCsr())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	if r.GetTtlSeconds() > uint64(ownerLife/time.Second) {
		return nil, errs.New(errs.Invalid, "ttl_seconds: %d is more than any profile allows", r.GetTtlSeconds())
	}
	l, err := forNode(r.GetProfile(), n, csr, time.Duration(r.GetTtlSeconds())*time.Second)
	if err != nil {
		d.count.refused.Add(1)
		d.log.Warn("certificate refused", "node", n.Name, "err", err.Error())
		return nil, err
	}
	k, _ := d.keys.Get()
	ca := profiles[r.GetProfile()].ca(k)
	if ca == nil {
		return nil, errs.New(errs.Precondition, "profile %q: its authority does not exist yet", r.GetProfile())
	}
	cert, err := ca.sign(csr.PublicKey, l, d.cfg.Random, d.cfg.Now())
	if err != nil {
		return nil, err
	}
	d.remember(r.GetProfile(), cert)
	return &trustv1.SignCertificateResponse{Certificate: string(pemCert(cert.Raw)), Ca: string(ca.pem), Chain: k.chain(ca)}, nil
}

func (s nodesServer) WatchCluster(r *trustv1.WatchClusterRequest, out grpc.ServerStreamingServer[trustv1.TrustState]) error {
	ctx, d, instance := out.Context(), s.d, hex.EncodeToString(r.GetProof().GetInstance())
	n, err := d.caller(ctx, r.GetProof(), join.WatchPayload(r.GetProof().GetInstance()))
	if err != nil {
		return err
	}
	var last *trustv1.TrustState
	for {
		state, changed := d.list.Get()
		k, keys := d.keys.Get()
		if state != nil && k.cluster != nil {
			word, _ := d.word.Get() // set before the list
			have, ok := state.Nodes[n.Name]
			// Just after it joined elsewhere the list may lag behind: only one that was told of the node once ends its watch.
			if last != nil && (!ok || have.Key != n.Key) {
				return errs.New(errs.Unauthenticated, "node %q was removed from the cluster", n.Name)
			}
			if _, _, err := have.Meet(instance); ok && errs.Is(err, errs.Denied) {
				return err
			}
			if ok && !proto.Equal(word, last) {
				if err := out.Send(word); err != nil {
					return err
				}
				last = word
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-keys:
		}
	}
}
