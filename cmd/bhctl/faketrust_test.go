package main

import (
	"context"
	"encoding/pem"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// fakeAuthorities replaces an authority a step further each time it is asked how far it is; n3 is slow.
type fakeAuthorities struct {
	trustv1.UnimplementedAuthoritiesServer
	trustv1.UnimplementedTrustServer
	ca *testca.CA

	mu sync.Mutex
	r  trustv1.Rotation // guarded by mu; its skip is finish == nil
}

func (f *fakeAuthorities) StartRotation(_ context.Context, r *trustv1.StartRotationRequest) (*trustv1.Rotation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range r.Which {
		if !slices.Contains([]string{"etcd", "front-proxy", "kubernetes", "os"}, w) {
			return nil, status.Errorf(codes.InvalidArgument, "which: %q; allowed are [\"etcd\" \"front-proxy\" \"kubernetes\" \"os\"]", w)
		}
	}
	if f.r.Stage == "" || f.r.Stage == "aborted" {
		f.r.Stage, f.r.Which, f.r.By, f.r.Entered, f.r.Waiting = "prepare", []string{"os"}, "admin", timestamppb.Now(), []string{"n3"}
	}
	if f.r.Finish = timestamppb.New(time.Unix(2e9, 0)); r.SkipWait {
		f.r.Finish = nil
	}
	return f.status(), nil
}

func (f *fakeAuthorities) status() *trustv1.Rotation {
	return &trustv1.Rotation{Stage: f.r.Stage, Which: f.r.Which, By: f.r.By, Entered: f.r.Entered, Waiting: f.r.Waiting, Finish: f.r.Finish}
}

func (f *fakeAuthorities) AbortRotation(context.Context, *trustv1.AbortRotationRequest) (*trustv1.Rotation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.r.Stage == "done" {
		return nil, status.Error(codes.FailedPrecondition, "the old authorities are removed already")
	}
	f.r.Stage, f.r.Waiting, f.r.Finish = "abort", nil, nil
	return f.status(), nil
}

func (f *fakeAuthorities) GetRotation(context.Context, *trustv1.GetRotationRequest) (*trustv1.Rotation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.status()
	switch {
	case len(f.r.Waiting) > 0:
		f.r.Waiting = nil
	case f.r.Stage == "prepare":
		f.r.Stage = "issue"
	case f.r.Stage == "issue" && f.r.Finish == nil:
		f.r.Stage = "done"
	case f.r.Stage == "abort":
		f.r.Stage = "aborted"
	}
	return now, nil
}

func (f *fakeAuthorities) ListCertificates(context.Context, *trustv1.ListCertificatesRequest) (*trustv1.ListCertificatesResponse, error) {
	s := f.ca.State()
	return &trustv1.ListCertificatesResponse{Certificates: []*trustv1.Certificate{
		{Profile: "os-ca", Pem: s.KubernetesCa, Generation: 1, State: "trusted"}, {Profile: "os-ca", Pem: s.EtcdCa, Generation: 2, State: "signs"},
	}}, nil
}

func (f *fakeAuthorities) IssueCertificate(ctx context.Context, r *trustv1.IssueCertificateRequest) (*trustv1.IssueCertificateResponse, error) {
	resp, err := f.ca.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "kubernetes-x", Csr: r.Csr})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(resp.Certificate))
	return &trustv1.IssueCertificateResponse{Certificate: block.Bytes, Expires: timestamppb.New(time.Now().Add(time.Duration(r.TtlSeconds) * time.Second))}, nil
}
