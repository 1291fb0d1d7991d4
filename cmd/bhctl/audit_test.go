package main

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/auditchain"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// auditOf is a node's log of four calls, as the cluster has heard of it.
func auditOf(node string) (out []*machinev1.AuditRecord, end auditchain.Head) {
	end = auditchain.Head{Chain: "log-of-" + node}
	for i := range 4 {
		r := auditchain.Record{Kind: auditchain.Call, Time: time.Unix(1e9+int64(i), 0).UTC(), Entry: json.RawMessage(fmt.Sprintf(`{"who":"ann","n":%d}`, i))}
		line, err := end.Next(&r)
		if err != nil {
			panic(err) // of what stands above
		}
		end = r.Head()
		out = append(out, &machinev1.AuditRecord{Kind: "call", Chain: r.Chain, Sequence: r.Sequence, Time: timestamppb.New(r.Time), Who: "ann", Roles: []string{"admin"}, Peer: "192.0.2.1:9",
			Method: "/config.v1.Config/Apply", Code: "OK", Node: node, Line: string(line)})
	}
	return out, end
}

// GetAudit: n1's log is as it was, of n2's the end was cut, and in w1's a name was changed.
func (f *fakeCluster) GetAudit(r *machinev1.GetAuditRequest, s grpc.ServerStreamingServer[machinev1.AuditRecord]) error {
	n, err := f.at(s.Context())
	if err != nil {
		return err
	}
	all, _ := auditOf(n)
	switch n {
	case "n2":
		all = all[:2]
	case "w1":
		all[1].Line = all[1].Line[:90] + "X" + all[1].Line[91:]
	}
	for _, a := range all {
		if r.GetUser() != "" && r.GetUser() != a.Who || r.GetSince().AsTime().After(a.Time.AsTime()) {
			continue
		}
		if err := s.Send(a); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeCluster) ListAuditAnchors(ctx context.Context, r *clusterv1.ListAuditAnchorsRequest) (*clusterv1.ListAuditAnchorsResponse, error) {
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get(peer.NodeKey)) > 0 {
		return nil, status.Error(codes.Internal, "the node itself was asked what the cluster remembers of it")
	}
	_, end := auditOf(r.GetName())
	return &clusterv1.ListAuditAnchorsResponse{Anchors: []*clusterv1.AuditAnchor{
		{Head: &clusterv1.AuditHead{Chain: "before-the-reset", Sequence: 70, Hash: "x"}, At: timestamppb.New(time.Unix(1e9-60, 0))},
		{Head: &clusterv1.AuditHead{Chain: end.Chain, Sequence: end.Sequence, Hash: end.Hash}, At: timestamppb.New(time.Unix(1e9+60, 0))},
	}}, nil
}

func TestSinceTime(t *testing.T) {
	now := time.Unix(1e9, 0)
	for in, want := range map[string]time.Time{"90m": now.Add(-90 * time.Minute), "2001-09-09T01:00:00Z": time.Date(2001, 9, 9, 1, 0, 0, 0, time.UTC)} {
		if got, err := sinceTime(in, now); err != nil || !got.AsTime().Equal(want) {
			t.Errorf("%q: %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"yesterday", "-5m", "2001-09-09"} {
		if _, err := sinceTime(in, now); err == nil {
			t.Errorf("%q is taken", in)
		}
	}
}
