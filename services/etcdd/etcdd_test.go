package etcdd

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func (n *node) as(t *testing.T, profile string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Logger: zap.NewNop(), Endpoints: []string{"https://" + n.client}, TLS: n.ca.Client(t, profile), DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestMember(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	n := newNode(t, ca, "n1", "127.0.0.1")
	n.start(t)
	n.until(t, func(s *controlv1.State) bool {
		return len(s.GetPending()) == 1 && s.GetPending()[0] == "wait for volume VAR"
	})
	if st, err := n.etcd.GetStatus(t.Context(), &etcdv1.GetStatusRequest{}); err != nil || st.GetState() != "waiting" {
		t.Fatalf("status without a volume: %v, %v, want waiting", st, err)
	}
	if err := os.Mkdir(n.cfg.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	n.until(t, converged)

	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	kube, own := n.as(t, "etcd-client-kube-apiserver"), n.as(t, "etcd-client-bulkhead")
	t.Run("rights", func(t *testing.T) { rights(ctx, t, kube, own, n.as(t, "etcd-server")) })
	// Who gets in there could speak raft, and raft knows no users: nobody but members may.
	t.Run("peers", func(t *testing.T) {
		for profile, ok := range map[string]bool{"etcd-peer": true, "etcd-client-kube-apiserver": false, "etcd-client-bulkhead": false, "etcd-server": false} {
			c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: ca.Client(t, profile), DisableKeepAlives: true}}
			resp, err := c.Get("https://127.0.0.1:" + n.port + "/members")
			if err == nil {
				resp.Body.Close()
			}
			if (err == nil) != ok {
				t.Errorf("members' port with a certificate of profile %s: %v, want an answer: %v", profile, err, ok)
			}
		}
	})
	t.Run("status", func(t *testing.T) {
		st, err := n.etcd.GetStatus(ctx, &etcdv1.GetStatusRequest{})
		if err != nil || st.GetState() != "running" || !st.GetLeader() || len(st.GetMembers()) != 1 || st.GetMembers()[0].GetName() != "n1" || st.GetRevision() < 2 {
			t.Errorf("status: %v, %v", st, err)
		}
	})
	t.Run("compact", func(t *testing.T) {
		r, err := kube.Put(ctx, "/registry/a", "new")
		if err != nil {
			t.Fatal(err)
		}
		root := n.as(t, "etcd-root")
		if _, err := compactTo(ctx, root, r.Header.Revision); err != nil {
			t.Fatal(err)
		}
		if _, err := root.Get(ctx, "/registry/a", clientv3.WithRev(r.Header.Revision-1)); !errors.Is(err, rpctypes.ErrCompacted) {
			t.Errorf("a compacted revision reads as %v, want %v", err, rpctypes.ErrCompacted)
		}
		if got, err := kube.Get(ctx, compactKey); err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Value) != strconv.FormatInt(r.Header.Revision, 10) {
			t.Errorf("%s: %v, %v, want %d", compactKey, got, err, r.Header.Revision)
		}
	})
	t.Run("leave", func(t *testing.T) { // machined may order it, before a reset; others of the node may not
		for id, want := range map[uid.ID]errs.Kind{uid.Machined: errs.Precondition, uid.Apid: errs.Precondition, uid.Trustd: errs.Denied} {
			if _, err := etcdv1.NewEtcdClient(n.dial(t, id)).Leave(ctx, &etcdv1.LeaveRequest{}); !errs.Is(err, want) {
				t.Errorf("%s orders the last member to leave: %v, want %v", id.Name(), err, want)
			}
		}
	})
	t.Run("care", func(t *testing.T) { care(ctx, t, n) })
	t.Run("snapshot", func(t *testing.T) { takeSnapshot(ctx, t, n) })
	watch := kube.Watch(ctx, "/registry/", clientv3.WithPrefix()) // a clean stop must not wait for it
	began := time.Now()
	n.stop(t)
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("stop took %s", d)
	}
	_ = watch
	for _, f := range []string{serverFile, peerFile, caFile} {
		if fi, err := os.Stat(filepath.Join(n.cfg.RunDir, f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v, want mode 0600", f, fi, err)
		}
	}

	n.start(t)
	n.until(t, converged)
	if r, err := n.as(t, "etcd-client-kube-apiserver").Get(ctx, "/registry/a"); err != nil || len(r.Kvs) != 1 {
		t.Errorf("after a restart: %v, %v, want the key", r, err)
	}
}

// care: defragmentation, alarms, and what one alone cannot do.
func care(ctx context.Context, t *testing.T, n *node) {
	root := n.as(t, "etcd-root")
	for i := range 20 {
		if _, err := root.Put(ctx, "/registry/big", strings.Repeat(strconv.Itoa(i), 256<<10)); err != nil {
			t.Fatal(err)
		}
	}
	r, err := root.Get(ctx, "/registry/big")
	if err == nil {
		_, err = root.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err != nil {
		t.Fatal(err)
	}
	if d, err := n.etcd.Defragment(ctx, &etcdv1.DefragmentRequest{}); err != nil || d.GetAfterBytes() == 0 || d.GetAfterBytes() >= d.GetBeforeBytes() {
		t.Errorf("defragment: %v, %v, want less than before", d, err)
	}
	alarm := &etcdserverpb.AlarmRequest{Action: etcdserverpb.AlarmRequest_ACTIVATE, Alarm: etcdserverpb.AlarmType_NOSPACE, MemberID: r.Header.GetMemberId()}
	if _, err := etcdserverpb.NewMaintenanceClient(root.ActiveConnection()).Alarm(ctx, alarm); err != nil {
		t.Fatal(err)
	}
	if st := n.status(t); st.GetState() != "error" || !slices.Equal(st.GetAlarms(), []string{"NOSPACE n1"}) {
		t.Errorf("status with an alarm: %v", st)
	}
	if d, err := n.etcd.DisarmAlarms(ctx, &etcdv1.DisarmAlarmsRequest{}); err != nil || !slices.Equal(d.GetDisarmed(), []string{"NOSPACE n1"}) {
		t.Errorf("disarm: %v, %v", d, err)
	}
	if st := n.status(t); st.GetState() != "running" || len(st.GetAlarms()) != 0 {
		t.Errorf("status after disarming: %v", st)
	}
	if f, err := n.etcd.ForfeitLeadership(ctx, &etcdv1.ForfeitLeadershipRequest{}); err != nil || f.GetLeader() != "" {
		t.Errorf("one alone forfeits: %v, %v, want nothing", f, err)
	}
}

// rights tries what each user must and must not be able to do.
func rights(ctx context.Context, t *testing.T, kube, own, stranger *clientv3.Client) {
	put := func(c *clientv3.Client, key string) func() error {
		return func() error { _, err := c.Put(ctx, key, "v"); return err }
	}
	for _, c := range []struct {
		name string
		do   func() error
		ok   bool
	}{
		{"kube puts under /registry/", put(kube, "/registry/a"), true},
		{"kube puts compact_rev_key", put(kube, "compact_rev_key"), true},
		{"kube probes its health key", func() error { _, err := kube.Get(ctx, "/registry/health"); return err }, true},
		{"kube lists", func() error { _, err := kube.Get(ctx, "/registry/pods/", clientv3.WithPrefix()); return err }, true},
		{"kube asks for the status", func() error { _, err := kube.Status(ctx, kube.Endpoints()[0]); return err }, true},
		{"kube grants a lease", func() error {
			l, err := kube.Grant(ctx, 60)
			if err == nil {
				_, err = kube.Put(ctx, "/registry/events/e", "v", clientv3.WithLease(l.ID))
			}
			return err
		}, true},
		{"kube compacts", func() error { _, err := kube.Compact(ctx, 2); return err }, false}, // etcd 3.7 reserves it to root, hence compact.go
		{"kube follows compactions", func() error { _, err := kube.Get(ctx, compactKey); return err }, true},
		{"kube puts under /bulkhead/", put(kube, "/bulkhead/a"), false},
		{"kube reads everything", func() error { _, err := kube.Get(ctx, "", clientv3.WithPrefix()); return err }, false},
		{"kube adds a user", func() error { _, err := kube.UserAdd(ctx, "x", "y"); return err }, false},
		{"kube takes a snapshot", func() error {
			r, err := kube.Snapshot(ctx)
			if err == nil {
				_, err = io.Copy(io.Discard, r)
			}
			return err
		}, false},
		{"bulkhead puts under /bulkhead/", put(own, "/bulkhead/a"), true},
		{"bulkhead reads a secret", func() error { _, err := own.Get(ctx, "/registry/a"); return err }, false},
		{"the server's own certificate reads", func() error { _, err := stranger.Get(ctx, "/registry/a"); return err }, false},
	} {
		if err := c.do(); (err == nil) != c.ok {
			t.Errorf("%s: %v, want allowed %v", c.name, err, c.ok)
		}
	}
}

func TestRenewedCertificateIsServed(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	n.volume(t)
	n.start(t)
	n.until(t, func(s *controlv1.State) bool { return s.GetConverged() })
	path := filepath.Join(n.cfg.RunDir, serverFile)
	block := func() string {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := pem.Decode(data)
		return string(b.Bytes)
	}
	// A file that lost its content is written again.
	before := block()
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.control.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: n.generation + 1, Documents: []byte(n.document())}}); err != nil {
		t.Fatal(err)
	}
	n.until(t, func(s *controlv1.State) bool { return s.GetConverged() && s.GetGeneration() == n.generation+1 })
	if after := block(); after != before {
		t.Error("the certificate's file was not restored")
	}
}

// TestWhileRunning: what waits for a member over a connection of its own ends when the member was stopped, and hears why; before, or after it was released, nothing ends.
func TestWhileRunning(t *testing.T) {
	m := &member{ended: make(chan struct{})}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + free(t)}, Logger: zap.NewNop()}) // nobody is there: it waits
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, release := m.whileRunning(t.Context())
	defer release()
	done := make(chan error, 1)
	go func() {
		_, err := client.Defragment(ctx, client.Endpoints()[0])
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("it ended while the member runs: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(m.ended)
	select {
	case err := <-done:
		if cause := context.Cause(ctx); err == nil || !errs.Is(cause, errs.Unavailable) || !strings.Contains(errs.Text(cause), "was stopped meanwhile") {
			t.Errorf("it ended with %v, because of %v", err, cause)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for a member that was stopped")
	}
}
