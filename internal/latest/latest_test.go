package latest

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

// A slow reader misses values in between, never the last one.
func TestWatchSeesTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c Cell[int]
		ctx, cancel := context.WithCancel(t.Context())
		gate := make(chan struct{})
		var seen []int
		done := make(chan error, 1)
		go func() {
			done <- c.Watch(ctx, func(v int) error {
				seen = append(seen, v)
				<-gate
				return nil
			})
		}()
		synctest.Wait()
		for i := 1; i <= 100; i++ {
			c.Set(i)
		}
		gate <- struct{}{}
		synctest.Wait()
		gate <- struct{}{}
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch = %v, want context.Canceled", err)
		}
		if len(seen) != 2 || seen[0] != 0 || seen[1] != 100 {
			t.Errorf("saw %v, want the value at the start and the last one", seen)
		}
	})
}

func TestWatchStopsOnError(t *testing.T) {
	var c Cell[string]
	want := errors.New("reader is gone")
	if err := c.Watch(t.Context(), func(string) error { return want }); !errors.Is(err, want) {
		t.Errorf("Watch = %v, want %v", err, want)
	}
}
