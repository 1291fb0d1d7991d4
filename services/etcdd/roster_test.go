package etcdd

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// trustd's list of nodes on real etcd: one token lets one machine in, however many try at once, and nothing that was noted at the same moment is lost.
func TestRoster(t *testing.T) {
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	n.volume(t)
	n.start(t)
	n.until(t, converged)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	r, now := roster.Roster{Store: n.store(t)}, time.Now()
	var seen latest.Cell[*roster.State]
	watching, end := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- r.Watch(watching, seen.Set) }()

	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for round := range 3 {
		token := fmt.Sprintf("000000000%d", round)
		must(r.AddToken(ctx, roster.Token{ID: token, Role: roster.Worker, Expires: now.Add(time.Hour), State: roster.Unused}, now))
		results := make(chan error, 8)
		for i := range cap(results) {
			go func() {
				name := fmt.Sprintf("w%d-%d", round, i)
				_, after, err := r.Join(ctx, roster.Applicant{Token: token, Name: name, Key: name, Address: "10.5.0.9"}, now)
				if err == nil && after.Nodes[name].Role != roster.Worker {
					t.Errorf("%s is let in and not on the list", name)
				}
				results <- err
			}()
		}
		in := 0
		for range cap(results) {
			switch err := <-results; {
			case err == nil:
				in++
			case !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "was used by node"):
				t.Error(err)
			}
		}
		if in != 1 {
			t.Errorf("one token let %d in", in)
		}
	}
	me := roster.Node{Name: "n1", Role: roster.ControlPlane, Key: "k1", Joined: now}
	must(r.Keep(ctx, me, "run1", []string{"10.5.0.1"}))
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			if err := r.Meet(ctx, me, "run1", fmt.Sprintf("10.5.1.%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	must(r.Revoke(ctx, "abc", "ann", now))
	must(r.AddToken(ctx, roster.Token{ID: "VOID", Expires: now.Add(time.Hour), State: roster.Unused}, now))
	must(r.RevokeToken(ctx, "VOID", now))
	must(r.AddToken(ctx, roster.Token{ID: "LATE", Expires: now.Add(time.Second - 24*time.Hour), State: roster.Unused}, now)) // it is forgotten in a second
	want, err := r.Read(ctx)
	must(err)
	for name := range want.Nodes {
		if strings.HasPrefix(name, "w0-") {
			must(r.Remove(ctx, name, "ann", now, func(roster.Node) error { return nil }))
		}
	}
	for {
		want, err = r.Read(ctx)
		must(err)
		got, changed := seen.Get()
		if _, late := want.Tokens["LATE"]; !late && reflect.DeepEqual(got, want) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("watched %+v\nread    %+v", got, want)
		}
	}
	if len(want.Nodes) != 3 || len(want.Nodes["n1"].Addresses) != 5 || len(want.Removed) != 1 || len(want.Revoked) != 1 || want.Tokens["VOID"].State != roster.Revoked {
		t.Errorf("%+v", want)
	}
	end()
	<-ended
}
