package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What a client of the Service does about a request that fails: as a balancer in front of the nodes does, it goes to another node. Each try is a connection of its own.
const (
	visitTries   = 4 // of one request, each at another node
	visitorCount = 2
	mostMissed   = 5 // requests that failed for good which a report tells of
)

var (
	visitPatience = slowly(10 * time.Second) // of one try; a node that has just died accepts and says nothing, because QEMU accepts for it
	visitPause    = slowly(200 * time.Millisecond)
)

// visitors ask a Service all the time, beginning at each node in turn. The zero value with doors set is ready.
type visitors struct {
	doors []string // URLs, one for each node

	mu      sync.Mutex
	took    []time.Duration // guarded by mu, as all below; of requests that were answered
	retried int             // requests that needed more than one try
	most    int             // tries of one request
	missed  []string        // requests that failed for good, and why
	pods    map[string]int  // who answered
}

// run goes on until ctx is done.
func (v *visitors) run(ctx context.Context) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	var g sync.WaitGroup
	for first := range visitorCount {
		g.Go(func() {
			for i := first; hold(ctx, visitPause) == nil; i++ {
				v.visit(ctx, c, i)
			}
		})
	}
	g.Wait()
}

// visit makes the i-th request.
func (v *visitors) visit(ctx context.Context, c *http.Client, i int) {
	start := time.Now()
	var wrong []error
	for try := range min(visitTries, len(v.doors)) {
		who, err := ask(ctx, c, v.doors[(i+try)%len(v.doors)])
		if ctx.Err() != nil {
			return // it was ended, and is no request that failed
		}
		if err != nil {
			wrong = append(wrong, err)
			continue
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.pods == nil {
			v.pods = map[string]int{}
		}
		v.pods[who]++
		v.took, v.most = append(v.took, time.Since(start)), max(v.most, try+1)
		if try > 0 {
			v.retried++
		}
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.missed = append(v.missed, fmt.Sprintf("%s: %v", start.Format(time.TimeOnly), errors.Join(wrong...)))
}

// ask is one try; it returns the pod's name.
func ask(ctx context.Context, c *http.Client, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, visitPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	who, said := strings.CutPrefix(string(body), "hello from ")
	if err == nil && (resp.StatusCode != http.StatusOK || !said) {
		err = fmt.Errorf("get %s: %s: %q", url, resp.Status, body)
	}
	who, _, _ = strings.Cut(who, ",")
	return who, err
}

// answered is how many requests were, so far.
func (v *visitors) answered() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.took)
}

// report prints the figures and returns the requests that failed beyond the policy. It is for after run.
func (v *visitors) report(t *testing.T) []string {
	t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	slices.Sort(v.took)
	at := func(share float64) time.Duration {
		if len(v.took) == 0 {
			return 0
		}
		return v.took[int(share*float64(len(v.took)-1))].Round(time.Millisecond)
	}
	t.Logf("» requests: %d answered by %d pods, %d of them after another try (at most %d tries, of %d that are allowed, each at another node, %s each), %d failed; p50 %s, p99 %s, longest %s",
		len(v.took), len(slices.Collect(maps.Keys(v.pods))), v.retried, v.most, visitTries, visitPatience, len(v.missed), at(0.5), at(0.99), at(1))
	return v.missed[:min(len(v.missed), mostMissed)]
}

// A request goes to the next node when one refuses, and is missed only when all tries are used up.
func TestVisitorsTryOtherNodes(t *testing.T) {
	good := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello from pod-1, request 1\n") }))
	defer good.Close()
	stranger := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "something else") }))
	defer stranger.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()

	v := &visitors{doors: []string{gone.URL, stranger.URL, good.URL}}
	for i := range 3 {
		v.visit(t.Context(), http.DefaultClient, i)
	}
	if missed := v.report(t); v.answered() != 3 || v.retried != 2 || v.most != 3 || len(missed) != 0 || v.pods["pod-1"] != 3 {
		t.Errorf("%d answered, %d retried, most %d, pods %v, missed %q", v.answered(), v.retried, v.most, v.pods, missed)
	}
	v = &visitors{doors: []string{gone.URL, stranger.URL}}
	v.visit(t.Context(), http.DefaultClient, 0)
	if missed := v.report(t); len(missed) != 1 || v.answered() != 0 || !strings.Contains(missed[0], "something else") {
		t.Errorf("missed: %q", missed)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	v.visit(ended, http.DefaultClient, 0)
	if missed := v.report(t); len(missed) != 1 {
		t.Errorf("a request that the test ended is counted: %q", missed)
	}
}
