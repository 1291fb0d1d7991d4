package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/bulkhead-os/bulkhead/internal/peer"
)

func target(ctx context.Context) string {
	md, _ := metadata.FromOutgoingContext(ctx)
	return strings.Join(md.Get(peer.NodeKey), "+")
}

func TestOnNode(t *testing.T) {
	outer := metadata.AppendToOutgoingContext(t.Context(), "x", "1")
	first := OnNode(outer, "a")
	if got := target(OnNode(first, "b")); got != "b" {
		t.Errorf("the second name: %q", got)
	}
	if target(first) != "a" || target(outer) != "" || target(OnNode(outer, "")) != "" {
		t.Error("a context was changed that was somebody else's")
	}
	if md, _ := metadata.FromOutgoingContext(first); md.Get("x")[0] != "1" {
		t.Error("other metadata is gone")
	}
}

// Results come as they are there, every node has one, and never more than limit are asked at once.
func TestEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var nodes []string
		for i := range 20 {
			nodes = append(nodes, fmt.Sprint("n", i))
		}
		var now, most atomic.Int32
		ask := func(ctx context.Context, node string) (string, error) {
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer now.Add(-1)
			if node == "n0" { // away
				<-time.After(time.Hour)
				return "", errors.New("away")
			}
			<-time.After(time.Second)
			return target(ctx), nil
		}
		var got []string
		begin := time.Now()
		for r := range Each(t.Context(), nodes, 3, ask) {
			if r.Err == nil && r.Value != r.Node {
				t.Errorf("%s was asked as %q", r.Node, r.Value)
			}
			if (r.Err != nil) != (r.Node == "n0") || r.Node != "n0" && time.Since(begin) > 10*time.Second {
				t.Errorf("%s after %s: %v", r.Node, time.Since(begin), r.Err)
			}
			got = append(got, r.Node)
		}
		if most.Load() != 3 || len(got) != 20 || got[19] != "n0" {
			t.Errorf("at most %d at once, results of %v", most.Load(), got)
		}
		slices.Sort(got)
		if len(slices.Compact(got)) != 20 {
			t.Errorf("not one result for each: %v", got)
		}
	})
}

// When the loop is left early the others are cancelled and waited for; when the context ends, every node still has a result.
func TestEachEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running atomic.Int32
		ask := func(ctx context.Context, node string) (int, error) {
			if node == "a" {
				return 1, nil
			}
			running.Add(1)
			defer running.Add(-1)
			<-ctx.Done()
			return 0, ctx.Err()
		}
		for r := range Each(t.Context(), []string{"a", "b", "c", "d"}, 2, ask) {
			if r.Value == 1 {
				synctest.Wait()
				if running.Load() == 0 {
					t.Error("nobody else is asked")
				}
				break
			}
		}
		if running.Load() != 0 {
			t.Errorf("%d calls outlive the loop", running.Load())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		n := 0
		for r := range Each(ctx, []string{"b", "c", "d", "e"}, 2, ask) {
			n++
			if !errors.Is(r.Err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", r.Node, r.Err)
			}
		}
		if n != 4 {
			t.Errorf("%d results, want 4", n)
		}
		for range Each(ctx, nil, 0, ask) {
			t.Error("a result of no node")
		}
	})
}
