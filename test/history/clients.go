package history

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"
)

// Later is what the second change of an item is called: "w1-7" is added, and once that was acknowledged, "w1-7/later".
const Later = "/later"

// ErrStale is what an error wraps by which a node denies what was acknowledged.
var ErrStale = errors.New("what was acknowledged is not there")

// A Set is the object as one client has it. It is used by one goroutine.
type Set interface {
	// Add adds an item by way of a node.
	Add(ctx context.Context, node, item string) error
	// List asks a node for all items. The caller keeps them.
	List(ctx context.Context, node string) ([]string, error)
}

// Clients are writers and readers. All but Pause of readers must be set.
type Clients struct {
	Nodes            []string
	Writers, Readers int
	// Open returns what a client uses; they are numbered from 0 on, the writers first.
	Open func(client int) Set
	// Pause is what a client waits between two operations, give or take a half.
	Pause time.Duration
	// Patience is how long one operation may take.
	Patience time.Duration
	// Most bounds the items that are added, later ones not counted. Clients go on with the rest.
	Most int
	Seed uint64
}

// Run has them work until ctx is done; what they are about then they end. It is no error that an operation fails.
func (c Clients) Run(ctx context.Context, r *Record) {
	var g errgroup.Group
	for i := range c.Writers + c.Readers {
		w := &worker{c: c, r: r, id: i, set: c.Open(i), random: rand.New(rand.NewPCG(c.Seed, uint64(i)))}
		g.Go(func() error {
			for turn := 0; w.pause(ctx); turn++ {
				w.turn(ctx, turn)
			}
			return nil
		})
	}
	_ = g.Wait()
}

// worker is one client at work.
type worker struct {
	c      Clients
	r      *Record
	id     int
	set    Set
	random *rand.Rand
	added  int
	next   string // an item that was acknowledged, and is to be changed
}

// pause returns false when it is time to go home.
func (w *worker) pause(ctx context.Context) bool {
	t := time.NewTimer(w.c.Pause/2 + time.Duration(w.random.Int64N(int64(w.c.Pause)+1)))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// turn is one operation. A writer reads as soon as it has written its share.
func (w *worker) turn(ctx context.Context, turn int) {
	op := Op{Client: w.id, Node: w.c.Nodes[w.random.IntN(len(w.c.Nodes))], Kind: List}
	switch {
	case w.id >= w.c.Writers:
	case w.next != "":
		op.Kind, op.Item, w.next = Add, w.next+Later, ""
	case w.added < w.c.Most/w.c.Writers:
		w.added++
		op.Kind, op.Item = Add, fmt.Sprintf("w%d-%d", w.id, turn)
	}
	if w.do(ctx, op) && op.Kind == Add && len(op.Item) > 0 && !isLater(op.Item) && w.random.IntN(4) > 0 {
		w.next = op.Item
	}
}

func isLater(item string) bool {
	return len(item) > len(Later) && item[len(item)-len(Later):] == Later
}

// do carries out and records an operation, and says whether it was acknowledged.
func (w *worker) do(ctx context.Context, op Op) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), w.c.Patience)
	defer cancel()
	var err error
	op.Call = w.r.Now()
	if op.Kind == Add {
		err = w.set.Add(ctx, op.Node, op.Item)
	} else {
		op.Items, err = w.set.List(ctx, op.Node)
	}
	op.Return = w.r.Now()
	if err != nil {
		op.Items, op.Error, op.Stale = nil, err.Error(), errors.Is(err, ErrStale)
	}
	w.r.Put(op)
	return err == nil
}

// Look has a client of its own list what there is at each node, and returns the first error.
func (c Clients) Look(ctx context.Context, r *Record) error {
	w := &worker{c: c, r: r, id: c.Writers + c.Readers, set: c.Open(c.Writers + c.Readers)}
	for _, node := range c.Nodes {
		if !w.do(ctx, Op{Client: w.id, Node: node, Kind: List}) {
			ops := r.Ops()
			return fmt.Errorf("list at %s: %s", node, ops[len(ops)-1].Error)
		}
	}
	return nil
}
