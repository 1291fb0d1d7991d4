package client

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"google.golang.org/grpc/metadata"

	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// OnNode returns a context whose calls are answered by the node of a name: the node that the connection leads to passes them on, if it is a control plane.
// "" changes nothing: that node answers itself.
func OnNode(ctx context.Context, name string) context.Context {
	if name == "" {
		return ctx
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	md = md.Copy()
	md.Set(peer.NodeKey, name) // a second one replaces the first: a call is for one node
	return metadata.NewOutgoingContext(ctx, md)
}

// MaxEach is how many nodes Each asks at once at most.
const MaxEach = 128

// Result is what became of one node's call.
type Result[T any] struct {
	Node  string
	Value T // the zero value if Err is set
	Err   error
}

// Each calls ask for every node, for at most limit of them at once (0 or less: 32; at most MaxEach), and yields each node's result as it comes, in no order: one for each
// name, also for those that were not asked since ctx was done. ctx in ask has the node already (OnNode). Calls need a deadline of their own: a node that is away holds
// one of the places meanwhile. When the loop is left early the other calls are cancelled; every ask has returned when the loop is over.
func Each[T any](ctx context.Context, nodes []string, limit int, ask func(ctx context.Context, node string) (T, error)) iter.Seq[Result[T]] {
	if limit <= 0 {
		limit = 32
	}
	limit = min(limit, MaxEach, len(nodes))
	return func(yield func(Result[T]) bool) {
		ctx, cancel := context.WithCancel(ctx)
		results := make(chan Result[T])
		next := make(chan string)
		var workers sync.WaitGroup
		defer workers.Wait()
		defer cancel()
		left := make(chan struct{})
		defer close(left)
		for range limit {
			workers.Go(func() {
				for node := range next {
					r := Result[T]{Node: node}
					if ctx.Err() == nil {
						r.Value, r.Err = ask(OnNode(ctx, node), node)
					} else {
						r.Err = fmt.Errorf("not asked: %w", context.Cause(ctx))
					}
					select {
					case results <- r:
					case <-left:
						return
					}
				}
			})
		}
		workers.Go(func() {
			defer close(next)
			for _, node := range nodes {
				select {
				case next <- node:
				case <-left:
					return
				}
			}
		})
		for range nodes {
			if !yield(<-results) {
				return
			}
		}
	}
}
