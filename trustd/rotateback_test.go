package trustd

import (
	"encoding/json"
	"strings"
	"testing"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// record waits until the record in etcd is as f wants it.
func (b *box) record(what string, f func(*roster.Rotation) bool) *roster.Rotation {
	b.t.Helper()
	for s, changed := b.d.list.Get(); ; s, changed = b.d.list.Get() {
		if f(s.Rotation) {
			return s.Rotation
		}
		select {
		case <-b.t.Context().Done():
			b.t.Fatalf("never %s; at last %+v", what, s.Rotation)
		case <-changed:
		}
	}
}

// Somebody restores a snapshot of etcd that knows nothing of the replacement, or less than the nodes: what they have done stays done.
func TestRotationSurvivesOldSnapshot(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	_, err := n1.authorities().StartRotation(n1.admin(), &trustv1.StartRotationRequest{Which: []string{"os"}})
	n1.must(err)
	n1.stage("issue")
	id := n1.record("confirmed", func(r *roster.Rotation) bool { return r != nil && r.Stage == roster.Issue }).ID
	list, _, err := n1.d.roster()
	n1.must(err)
	s, err := list.Store.Read(t.Context(), &storev1.ReadRequest{Prefix: roster.Prefix + "rotation"})
	n1.must(err)
	_, err = list.Store.Write(t.Context(), &storev1.WriteRequest{Changes: []*storev1.Change{{Key: s.GetEntries()[0].GetKey(), Delete: true}}})
	n1.must(err)
	written := func() (stage string, revision uint64) {
		s, err := list.Store.Read(t.Context(), &storev1.ReadRequest{Prefix: roster.Prefix + "rotation"})
		n1.must(err)
		var r roster.Rotation
		n1.must(json.Unmarshal(s.GetEntries()[0].GetValue(), &r))
		return r.Stage, s.GetEntries()[0].GetRevision()
	}
	n1.record("gone", func(r *roster.Rotation) bool { return r == nil || r.By == "restored" })
	if r := n1.record("back", func(r *roster.Rotation) bool { return r != nil }); r.ID != id || r.Stage != roster.Issue || r.Wait == 0 {
		t.Errorf("the record came back as %+v, was %s at issue", r, id)
	}
	_, err = n1.authorities().StartRotation(n1.admin(), &trustv1.StartRotationRequest{Which: []string{"os"}, SkipWait: true})
	n1.must(err)
	n1.record("done", func(r *roster.Rotation) bool { return r.Stage == roster.Done })
	_, done := written()
	n1.must(list.Change(t.Context(), func(_ *roster.State, r *roster.Rotation) (bool, error) {
		r.Stage = roster.Prepare
		return true, nil
	}))
	for { // that it was set back may be over before anybody here has seen it
		_, changed := n1.d.list.Get()
		if stage, revision := written(); stage == roster.Done && revision > done {
			break
		}
		<-changed
	}
	if s, _ := n1.d.trust.Get(); strings.Count(s.GetOsCa(), "BEGIN") != 1 {
		t.Error("the old authority is trusted again")
	}
}
