package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
)

func (f *fakeCluster) AllowAttestation(_ context.Context, r *trustv1.AllowAttestationRequest) (*trustv1.AllowAttestationResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := &trustv1.Attestation{
		Id: fmt.Sprintf("ATTEST%04d", len(f.attested)), Role: r.Role, Name: r.Name, EndorsementKey: r.EndorsementKey, Pcr7: r.Pcr7, Pcr11: r.Pcr11, ImageKey: r.ImageKey,
		State: "unused", MadeBy: "admin", Expires: timestamppb.New(time.Now().Add(time.Duration(r.TtlSeconds) * time.Second)),
	}
	if r.EndorsementAuthorities != "" {
		a.EndorsementAuthorities = []string{"CN=maker"}
	}
	f.attested = append(f.attested, a)
	return &trustv1.AllowAttestationResponse{Id: a.Id, Expires: a.Expires}, nil
}

func (f *fakeCluster) ListAttestations(context.Context, *trustv1.ListAttestationsRequest) (*trustv1.ListAttestationsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &trustv1.ListAttestationsResponse{Attestations: f.attested}, nil
}

func (f *fakeCluster) RevokeAttestation(_ context.Context, r *trustv1.RevokeAttestationRequest) (*trustv1.RevokeAttestationResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.attested {
		if a.Id == r.Id {
			a.State = "revoked"
			return &trustv1.RevokeAttestationResponse{}, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "there is no attestation %q", r.Id)
}
