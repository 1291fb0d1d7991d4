package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// progress tells a person what long work is doing: the step, how long it has taken, and the longest it usually takes.
// On a terminal the line is written again each second; elsewhere each step is one line when it begins and one when it ends.
type progress struct {
	w     io.Writer
	live  bool
	start time.Time
	slow  int // so many times longer than usual each step takes, as the machines' clocks are slow; 0 and 1: as long
	mu    sync.Mutex
	note  string // guarded by mu
}

func (a *app) progress() *progress {
	return &progress{w: a.out, live: a.width() > 0, start: time.Now()}
}

// say sets what stands behind the running step, for example what is being waited for.
func (p *progress) say(note string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note = note
}

// step runs f and shows it. expected is the longest usual time; f may take longer, up to its own limit.
func (p *progress) step(ctx context.Context, name string, expected time.Duration, f func(context.Context) error) error {
	p.say("")
	expected *= time.Duration(max(1, p.slow))
	begin := time.Now()
	if !p.live {
		fmt.Fprintf(p.w, "%5s  %s (up to %s)\n", round(time.Since(p.start)), name, expected)
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	if p.live {
		wg.Go(func() { p.tick(name, expected, begin, done) })
	}
	err := f(ctx)
	close(done)
	wg.Wait()
	mark := "done"
	if err != nil {
		mark = "FAILED"
	}
	if p.live {
		fmt.Fprintf(p.w, "\r\x1b[K%5s  %s: %s in %s\n", round(time.Since(p.start)), name, mark, round(time.Since(begin)))
	} else {
		fmt.Fprintf(p.w, "%5s  %s: %s in %s\n", round(time.Since(p.start)), name, mark, round(time.Since(begin)))
	}
	return err
}

func (p *progress) tick(name string, expected time.Duration, begin time.Time, done <-chan struct{}) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		p.mu.Lock()
		note := p.note
		p.mu.Unlock()
		line := fmt.Sprintf("%5s  %s … %s (up to %s) %s", round(time.Since(p.start)), name, round(time.Since(begin)), expected, note)
		fmt.Fprintf(p.w, "\r\x1b[K%s", cut(strings.TrimRight(line, " "), 100))
		select {
		case <-done:
			return
		case <-t.C:
		}
	}
}

func round(d time.Duration) string {
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
