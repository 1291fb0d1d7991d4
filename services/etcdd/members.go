package etcdd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Bounds of what is done to a member.
const (
	defragTime = 5 * time.Minute
	leaveTime  = 20 * time.Second // from its removal to its end

	connectedTime  = 7 * time.Second        // for a change of the membership; etcd wants five
	connectedPause = 500 * time.Millisecond // between two tries while etcd has not been connected for long enough
)

// reconfigure waits for the one slot for changes of the membership that go through this member, and returns its client. The caller calls done.
func (m *member) reconfigure(ctx context.Context) (done func(), c *clientv3.Client, err error) {
	if e, _ := m.running(); e != nil && isLearner(e) {
		return nil, nil, errs.New(errs.Unavailable, "this etcd member is only joining itself")
	}
	select {
	case m.changes <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	if err := m.pass(ctx); err != nil {
		<-m.changes
		return nil, nil, err
	}
	_, c = m.running()
	if c == nil {
		<-m.changes
		return nil, nil, errs.New(errs.Unavailable, "the etcd member does not run")
	}
	return func() { <-m.changes }, c, nil
}

// whileRunning returns a context that ends with the member, too, with that as its cause. For what etcd's client does over a connection of its own to one endpoint (maintenance): it is not
// closed with the client, and waits for a member that was stopped meanwhile. The caller calls release. Callers have the client of reconfigure.
func (m *member) whileRunning(ctx context.Context) (running context.Context, release func()) {
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-ctx.Done():
		case <-ended:
			cancel(errs.New(errs.Unavailable, "the etcd member was stopped meanwhile"))
		}
	}()
	return ctx, func() { cancel(nil) }
}

// connected carries out a change of the membership. etcd refuses it until this member has been connected to enough others for five seconds
// (etcdserver.HealthInterval): right after one came, that is waited for.
func connected(ctx context.Context, change func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, connectedTime)
	defer cancel()
	for {
		err := change(ctx)
		if !errors.Is(err, rpctypes.ErrUnhealthy) || wait(ctx, connectedPause) != nil {
			return err
		}
	}
}

// tellRefused makes an event of a change of the members that was refused, because the quorum would be lost or somebody is not who they say.
func (d *Daemon) tellRefused(what, by string, err error) {
	if errs.Is(err, errs.Precondition) || errs.Is(err, errs.Denied) {
		daemon.Tell(d.env.Log, daemon.EventCluster, what+" "+by, fmt.Sprintf("%q may not change etcd's members: %s", by, errs.Text(err)))
	}
}

// RemoveMember is for another one; this one is removed by Leave, which takes its data too.
func (s *server) RemoveMember(ctx context.Context, r *etcdv1.RemoveMemberRequest) (_ *etcdv1.RemoveMemberResponse, err error) {
	defer func() { s.d.tellRefused("remove "+r.GetName(), peer.CallerFrom(ctx).Name, err) }()
	m := s.d.kernel
	done, client, err := m.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	all, err := m.voices(ctx)
	if err != nil {
		return nil, err
	}
	v, err := find(all, r.GetName())
	if err != nil {
		return nil, err
	}
	if v.id == m.id() {
		return nil, errs.New(errs.Precondition, "remove %s: it is this node's own member; run: bhctl -n %s etcd leave", v, v.name)
	}
	if err := mayGo(all, v.id); err != nil {
		return nil, errs.New(errs.Of(err), "remove %s: %w", v, err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	err = connected(ctx, func(ctx context.Context) error { _, err := client.MemberRemove(ctx, v.id); return err })
	if err != nil {
		return nil, memberError("remove "+v.String(), err)
	}
	s.d.env.Log.Info("member removed", "step", "member remove "+v.String())
	return &etcdv1.RemoveMemberResponse{}, nil
}

// Leave writes down what it is about, so that a restart goes on with it, and takes that back if it is refused.
func (s *server) Leave(ctx context.Context, r *etcdv1.LeaveRequest) (_ *etcdv1.LeaveResponse, err error) {
	defer func() { s.d.tellRefused("leave", peer.CallerFrom(ctx).Name, err) }()
	m := s.d.kernel
	if r.GetForce() {
		return &etcdv1.LeaveResponse{}, s.abandon()
	}
	switch p, err := readPhase(m.cfg.DataDir); {
	case err != nil:
		return nil, err
	case p == left: // done already
		return &etcdv1.LeaveResponse{}, nil
	case p == removed: // by others; its data are left to do
		return &etcdv1.LeaveResponse{}, m.forget()
	}
	done, _, err := m.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := m.leave(ctx); err != nil {
		return nil, err
	}
	s.d.loop.Wake()
	return &etcdv1.LeaveResponse{}, nil
}

// abandon deletes the member without a word to others. The loop does the rest.
func (s *server) abandon() error {
	m := s.d.kernel
	if !isDir(m.cfg.DataDir) {
		return errs.New(errs.Unavailable, "leave: volume VAR is not there yet")
	}
	if _, err := m.changePhase(abandoning); err != nil {
		return err
	}
	s.d.env.Log.Warn("member abandoned by order: others may count on its vote still", "step", "member leave")
	s.d.loop.Wake()
	return nil
}

// leave removes this member and waits for its end. Doing it again goes on with it. m.changes is held.
func (m *member) leave(ctx context.Context) error {
	e, client := m.running()
	if e == nil {
		return errs.New(errs.Unavailable, "leave: the etcd member does not run")
	}
	all, err := m.voices(ctx)
	if err != nil {
		return err
	}
	own := m.id()
	if err := mayGo(all, own); err != nil {
		m.stay()
		return errs.New(errs.Of(err), "leave: %w", err)
	}
	// A leader that goes leaves the others without one for an election.
	if _, err := m.forfeit(ctx, client, all); err != nil {
		m.stay()
		return errs.New(errs.Of(err), "leave: %w", err)
	}
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	if _, err := m.changePhase(leaving, inCluster, leaving); err != nil {
		return errs.New(errs.Of(err), "leave: %w", err)
	}
	call, cancel := context.WithTimeout(ctx, callTime)
	err = connected(call, func(ctx context.Context) error { _, err := client.MemberRemove(ctx, own); return err })
	cancel()
	if errors.Is(err, rpctypes.ErrUnhealthy) {
		m.stay()
	}
	// The others may have removed it before it had seen that itself: then nobody tells it any more, until it asks for a leader and stops in the middle of the call, or after
	// it. Its end says what became of it.
	unknown := errors.Is(err, rpctypes.ErrStopped) || errors.Is(err, context.DeadlineExceeded)
	if err != nil && !unknown {
		// Unless it was refused, whether it was done is not known: the phase stays, and the loop goes on.
		return memberError("leave", err)
	}
	ctx, cancel = context.WithTimeout(ctx, leaveTime)
	defer cancel()
	select {
	case <-ended:
		if p, e := readPhase(m.cfg.DataDir); unknown && (e != nil || p != left) {
			return memberError("leave", err)
		}
		return nil
	case <-ctx.Done():
		if unknown {
			return errs.New(errs.Unavailable, "leave: whether the others removed the member is not known yet (%w); it goes on: bhctl etcd members", err)
		}
		return errs.New(errs.Unavailable, "leave: the member is removed, and its end was not seen within %s; it goes on", leaveTime)
	}
}

// stay takes an order to leave back that was refused.
func (m *member) stay() {
	if was, err := m.changePhase(inCluster, inCluster, leaving); err != nil && was != abandoning {
		m.cfg.Env.Log.Error("order to leave not taken back", "err", err.Error())
	}
}

// id is this member's own; 0 while it does not run.
func (m *member) id() uint64 {
	e, _ := m.running()
	if e == nil {
		return 0
	}
	return uint64(e.Server.MemberID())
}

// Rejoin lets a member that went come back, with empty data.
func (s *server) Rejoin(context.Context, *etcdv1.RejoinRequest) (*etcdv1.RejoinResponse, error) {
	dir := s.d.kernel.cfg.DataDir
	p, err := readPhase(dir)
	if err != nil {
		return nil, err
	}
	if e, _ := s.d.kernel.running(); e != nil || p != left && p != removed {
		return nil, errs.New(errs.Precondition, "this node's etcd member neither left nor was removed")
	}
	if err := dropData(dir); err != nil {
		return nil, err
	}
	if _, err := s.d.kernel.changePhase(inCluster, left, removed); err != nil {
		return nil, err
	}
	s.d.loop.Wake()
	return &etcdv1.RejoinResponse{}, nil
}

func (s *server) ForfeitLeadership(ctx context.Context, _ *etcdv1.ForfeitLeadershipRequest) (*etcdv1.ForfeitLeadershipResponse, error) {
	m := s.d.kernel
	done, client, err := m.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	all, err := m.voices(ctx)
	if err != nil {
		return nil, err
	}
	name, err := m.forfeit(ctx, client, all)
	return &etcdv1.ForfeitLeadershipResponse{Leader: name}, err
}

// forfeit hands leadership to a voter that answers, and returns the leader's name; "" if this one leads, being alone.
func (m *member) forfeit(ctx context.Context, c *clientv3.Client, all []voice) (string, error) {
	own, others := m.id(), 0
	for _, v := range all {
		if v.leads && v.id != own {
			return v.name, nil
		}
		if v.id != own && !v.learner {
			others++
		}
	}
	if others == 0 {
		return "", nil
	}
	i := slices.IndexFunc(all, func(v voice) bool { return v.id != own && !v.learner && v.answers })
	if i < 0 {
		return "", errs.New(errs.Precondition, "leadership cannot be handed over: no other voter answers")
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if _, err := c.MoveLeader(ctx, all[i].id); err != nil {
		return "", memberError("hand leadership to "+all[i].name, err)
	}
	m.cfg.Env.Log.Info("leadership handed over", "step", "leader "+all[i].name)
	return all[i].name, nil
}

// Defragment stops this member for as long as it takes to write the database anew.
func (s *server) Defragment(ctx context.Context, _ *etcdv1.DefragmentRequest) (*etcdv1.DefragmentResponse, error) {
	m := s.d.kernel
	done, client, err := m.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	all, err := m.voices(ctx)
	if err == nil {
		err = allThere(all, "defragment")
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, defragTime)
	defer cancel()
	ctx, release := m.whileRunning(ctx)
	defer release()
	failed := func(what string, err error) error {
		if cause := context.Cause(ctx); errs.Is(cause, errs.Unavailable) {
			return errs.New(errs.Unavailable, "%s: %w", what, cause)
		}
		return memberError(what, err)
	}
	endpoint := client.Endpoints()[0]
	before, err := client.Status(ctx, endpoint)
	if err != nil {
		return nil, failed("status", err)
	}
	if _, err := client.Defragment(ctx, endpoint); err != nil {
		return nil, failed("defragment", err)
	}
	after, err := client.Status(ctx, endpoint)
	if err != nil {
		return nil, failed("status", err)
	}
	s.d.env.Log.Info("database defragmented", "step", "defragment")
	return &etcdv1.DefragmentResponse{BeforeBytes: uint64(before.DbSize), AfterBytes: uint64(after.DbSize)}, nil
}

// DisarmAlarms disarms those of all members, and returns what they were: "NOSPACE n2".
func (s *server) DisarmAlarms(ctx context.Context, _ *etcdv1.DisarmAlarmsRequest) (*etcdv1.DisarmAlarmsResponse, error) {
	m := s.d.kernel
	done, client, err := m.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	list, err := m.list(ctx, client)
	if err != nil {
		return nil, err
	}
	resp, err := client.AlarmDisarm(ctx, &clientv3.AlarmMember{}) // the zero value: all
	if err != nil {
		return nil, memberError("disarm alarms", err)
	}
	return &etcdv1.DisarmAlarmsResponse{Disarmed: alarmTexts(resp.Alarms, list)}, nil
}

// alarmTexts names each alarm and the member that raised it.
func alarmTexts(alarms []*etcdserverpb.AlarmMember, list []*etcdserverpb.Member) []string {
	var out []string
	for _, a := range alarms {
		name := hexID(a.GetMemberID())
		for _, m := range list {
			if m.GetID() == a.GetMemberID() && m.GetName() != "" {
				name = m.GetName()
			}
		}
		out = append(out, strings.TrimSpace(a.GetAlarm().String()+" "+name))
	}
	slices.Sort(out)
	return out
}
