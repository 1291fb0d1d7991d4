package main

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// fakeRolling is a change of two nodes. The control plane that is asked goes down in the middle of it, as that of n1's turn does; the next one knows the end.
type fakeRolling struct {
	clusterv1.UnimplementedRollingServer

	mu      sync.Mutex
	now     *clusterv1.RollingStatus // guarded by mu; nil: none
	watches int                      // guarded by mu
}

func (f *fakeRolling) set(change func(*clusterv1.RollingStatus)) *clusterv1.RollingStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now == nil {
		f.now = &clusterv1.RollingStatus{State: "none"}
	}
	next := proto.CloneOf(f.now)
	change(next)
	f.now = next
	return next
}

func (f *fakeRolling) Start(_ context.Context, r *clusterv1.StartRequest) (*clusterv1.StartResponse, error) {
	var err error
	st := f.set(func(s *clusterv1.RollingStatus) {
		if s.State == "running" || s.State == "halted" {
			err = errs.New(errs.Precondition, "rolling reboot %s, ordered by %s, is %s; one at a time", s.Id, s.OrderedBy, s.State)
			return
		}
		*s = clusterv1.RollingStatus{Id: "abc", Kind: r.Kind, Version: r.Version, State: "running", OrderedBy: "admin", OnTimeout: r.OnTimeout, DrainTimeoutSeconds: r.DrainTimeoutSeconds,
			Nodes: []*clusterv1.RollingNode{{Name: "n1", Role: "controlplane", State: "pending"}, {Name: "w1", Role: "worker", State: "pending"}}}
		if len(r.Nodes) > 0 {
			s.Nodes = s.Nodes[:1]
		}
	})
	return &clusterv1.StartResponse{Status: st}, err
}

func (f *fakeRolling) Resume(context.Context, *clusterv1.ResumeRequest) (*clusterv1.ResumeResponse, error) {
	return &clusterv1.ResumeResponse{Status: f.set(func(s *clusterv1.RollingStatus) { s.State, s.Detail = "running", "" })}, nil
}

func (f *fakeRolling) Abort(context.Context, *clusterv1.AbortRequest) (*clusterv1.AbortResponse, error) {
	return &clusterv1.AbortResponse{Status: f.set(func(s *clusterv1.RollingStatus) { s.State = "aborted" })}, nil
}

func (f *fakeRolling) GetStatus(context.Context, *clusterv1.GetStatusRequest) (*clusterv1.RollingStatus, error) {
	return f.set(func(*clusterv1.RollingStatus) {}), nil
}

func (f *fakeRolling) WatchStatus(_ *clusterv1.WatchStatusRequest, out grpc.ServerStreamingServer[clusterv1.RollingStatus]) error {
	f.mu.Lock()
	f.watches++
	n := f.watches
	f.mu.Unlock()
	step := func(i int, state, detail string) *clusterv1.RollingStatus {
		return f.set(func(s *clusterv1.RollingStatus) {
			s.Nodes[i].State, s.Nodes[i].Detail, s.ElapsedSeconds = state, detail, s.ElapsedSeconds+10
		})
	}
	var err error
	send := func(st *clusterv1.RollingStatus) {
		if err == nil {
			err = out.Send(st)
		}
	}
	switch n {
	case 1:
		send(step(0, "draining", "2 pods are left: default/web-1, default/web-2"))
		send(step(0, "restarting", ""))
		return errs.New(errs.Unavailable, "etcdd is stopping; try again")
	case 2:
		step(0, "done", "")
		send(step(1, "restarting", ""))
		send(f.set(func(s *clusterv1.RollingStatus) { s.State, s.Detail = "halted", "w1: it is back, but not ready" }))
	default:
		step(1, "done", "")
		send(f.set(func(s *clusterv1.RollingStatus) { s.State, s.Detail = "done", "" }))
	}
	return err
}

func TestRollingLine(t *testing.T) {
	st := &clusterv1.RollingStatus{ElapsedSeconds: 60, ExpectedSeconds: 100, Nodes: []*clusterv1.RollingNode{{Name: "n1", State: "done"}, {Name: "n2", State: "settling", Detail: "it is lost"}}}
	if got, want := strings.TrimSpace(rollingLine(st, 20*time.Second)), "1m20s of about 1m40s  n2 (2 of 2): settling, it is lost"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := rollingLine(st, 100*time.Second); !strings.Contains(got, "2m40s of about 2m40s") {
		t.Errorf("later than expected: %q", got)
	}
}
