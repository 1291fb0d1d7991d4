// Package latest passes the newest value of something from one writer to any number of readers.
//
// A reader wants the present, not history: it misses values in between, never the last one.
package latest

import (
	"context"
	"sync"
)

// Cell holds the newest value. The zero value holds the zero value of T. It is safe for concurrent use.
type Cell[T any] struct {
	mu      sync.Mutex
	value   T             // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced by Set; nil until somebody waits
}

// Set replaces the value and wakes every reader. It never blocks.
func (c *Cell[T]) Set(v T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.value = v
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// Get returns the newest value, and a channel that is closed when there is a newer one.
func (c *Cell[T]) Get() (T, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return c.value, c.changed
}

// Watch calls f with the newest value now and after each change, one call at a time, until ctx is done or f fails.
func (c *Cell[T]) Watch(ctx context.Context, f func(T) error) error {
	for {
		v, changed := c.Get()
		if err := f(v); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
