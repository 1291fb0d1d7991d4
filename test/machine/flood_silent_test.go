package machine

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// way is one more port of the host that QEMU's forwarder leads to a door: it lets one connection wait on each.
//
// The forwarder knows a connection by the client's port and the guest's, not by its own: two clients with one number that come by two
// ways to one door are one connection to it, and their packets go to either. The host gives the same number to connections with
// different ends, so each way has its own numbers, and none of those that the host gives to others.
type way struct {
	address string
	first   int           // of wayPorts numbers below net.ipv4.ip_local_port_range
	next    atomic.Uint32 // counts connections
}

const wayPorts = 2_500

func (w *way) dial(ctx context.Context) (net.Conn, error) {
	for range wayPorts {
		port := w.first + int(w.next.Add(1))%wayPorts
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}).DialContext(ctx, "tcp4", w.address)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return c, err
		}
	}
	return nil, fmt.Errorf("no free port of the %d from %d on", wayPorts, w.first)
}

// keep remembers a stranger's connection so that it is closed with the test.
func (f *flood) keep(c net.Conn) net.Conn {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.connections = append(f.connections, c)
	return c
}

// hello returns the first message of a TLS handshake.
func (f *flood) hello(t *testing.T) []byte {
	t.Helper()
	a, b := net.Pipe()
	go func() { _ = tls.Client(a, f.tls).HandshakeContext(t.Context()); a.Close() }()
	buf := make([]byte, 4<<10)
	n, err := b.Read(buf)
	b.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// slow clients send one byte a second: of a handshake, of HTTP's headers, of a body, of HTTP/2's preface. All of them are
// more than the gateway has places. The node must end each of them by itself.
func (f *flood) slow(t *testing.T) {
	const each, limit = 50, 45 * time.Second
	hello := f.hello(t)
	headers := []byte("GET /v1/version HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("a", 200))
	body := []byte("POST /v1/config:apply HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range []struct {
		what     string
		door     int
		proto    string // "": no TLS
		at, drip []byte
	}{
		{"hello to apid", 0, "", nil, hello},
		{"hello to gateway", 1, "", nil, hello},
		{"HTTP/2 preface to apid", 0, "h2", nil, []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + strings.Repeat("\x00", 100))},
		{"headers to gateway", 1, "http/1.1", nil, headers},
		{"body to gateway", 1, "http/1.1", body, bytes.Repeat([]byte(" "), 200)},
	} {
		var longest, ended atomic.Int64
		var group sync.WaitGroup
		for i := range each {
			w := f.ways[s.door][i%len(f.ways[s.door])]
			wait(ctx, pace/4)
			group.Go(func() {
				start := time.Now()
				if drip(ctx, f, w, s.proto, s.at, s.drip) {
					ended.Add(1)
					longest.Store(max(longest.Load(), int64(time.Since(start))))
				}
			})
		}
		wg.Go(func() {
			group.Wait()
			t.Logf("» one byte a second, %s: the node ended %d of %d, the last after %s", s.what, ended.Load(), each, time.Duration(longest.Load()).Round(time.Second))
			if ended.Load() < each {
				t.Errorf("%s: %d of %d slow clients are still there after %s", s.what, each-ended.Load(), each, limit)
			}
		})
	}
	wg.Wait()
	open := f.figures(t, "connections")
	t.Logf("» after the slow clients %.0f connections are open at apid and %.0f at gateway", open["apid"], open["gateway"])
	if open["apid"] > 8 || open["gateway"] > 8 {
		t.Errorf("open connections after %s: %v, want only those with credentials", limit, open)
	}
}

// drip sends data one byte a second and reports whether the other side ended the connection before ctx is done.
func drip(ctx context.Context, f *flood, w *way, proto string, at, data []byte) bool {
	c, err := w.dial(ctx)
	if err != nil {
		return ctx.Err() == nil
	}
	f.keep(c)
	if proto != "" {
		cfg := f.tls.Clone()
		cfg.NextProtos = []string{proto}
		tc := tls.Client(c, cfg)
		if err := tc.HandshakeContext(ctx); err != nil {
			return ctx.Err() == nil
		}
		c = tc
	}
	if _, err := c.Write(at); err != nil {
		return true
	}
	end := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, c) // until the node ends it
		close(end)
	}()
	for i := 0; ; i++ {
		if _, err := c.Write(data[i%len(data) : i%len(data)+1]); err != nil {
			return true
		}
		select {
		case <-end:
			return true
		case <-ctx.Done():
			return false
		case <-time.After(time.Second):
		}
	}
}

// garbage sends random bytes to both ports: bare, dressed as a TLS record, inside TLS, and as HTTP/2 frames.
func (f *flood) garbage(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	slots := make(chan struct{}, 24)
	var wg sync.WaitGroup
	var sent [4]atomic.Int64
	for i := range 320 {
		data := make([]byte, 1+random.IntN(16<<10))
		for j := range data {
			data[j] = byte(random.Uint32())
		}
		address, kind := []string{f.api, f.rest}[i%2], i/2%4
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if throw(ctx, f, address, kind, data) {
				sent[kind].Add(1)
			}
		})
	}
	wg.Wait()
	t.Logf("» garbage that was sent whole or until the node hung up: %d bare, %d as TLS records, %d inside TLS, %d behind HTTP/2's preface", sent[0].Load(), sent[1].Load(), sent[2].Load(), sent[3].Load())
	for i := range sent {
		if sent[i].Load() < 60 {
			t.Errorf("kind %d: only %d of 80 got through to be refused", i, sent[i].Load())
		}
	}
}

// throw sends data and reads what comes; it reports whether the connection was made.
func throw(ctx context.Context, f *flood, address string, kind int, data []byte) bool {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	switch kind {
	case 1:
		data = append([]byte{22, 3, 1, byte(len(data) >> 8), byte(len(data))}, data...)
	case 2, 3:
		cfg := f.tls.Clone()
		cfg.NextProtos = []string{"h2"}
		tc := tls.Client(c, cfg)
		if tc.HandshakeContext(ctx) != nil {
			return false
		}
		c = tc
	}
	if kind == 3 {
		data = append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"), data...)
	}
	_, _ = c.Write(data)
	_, _ = io.Copy(io.Discard, c)
	return true
}

// pace is the time between two connections to one port of QEMU's forwarder: faster ones overrun its backlog, and never reach the node.
const pace = 30 * time.Millisecond

// idle opens 10,000 connections that say nothing, as many of them at once as the node lets be. How many reached the node is what
// the node counted.
func (f *flood) idle(t *testing.T) {
	const total, limit = 10_000, 110 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	// At once, more than the doors have places. A node whose processor is too slow for all who come lets them wait in the order in which they came: with no bound on
	// those before it, an honest one would wait for as long as the strangers' host has sockets.
	sockets := make(chan struct{}, 1_000)
	before, turned, start := f.arrived(t), f.figures(t, "connections_refused_total"), time.Now()
	var dialled, failed, open, most atomic.Int64
	var wg sync.WaitGroup
	for _, w := range slices.Concat(f.ways[:]...) {
		wg.Go(func() {
			for dialled.Add(1) <= total {
				select {
				case <-ctx.Done():
					return
				case sockets <- struct{}{}:
				}
				patience, cancel := context.WithTimeout(ctx, 20*time.Second)
				c, err := w.dial(patience)
				cancel()
				if err != nil {
					failed.Add(1)
					<-sockets
					continue
				}
				f.keep(c)
				most.Store(max(most.Load(), open.Add(1)))
				go func() {
					_, _ = io.Copy(io.Discard, c) // until the node ends it
					open.Add(-1)
					c.Close()
					<-sockets
				}()
				wait(ctx, pace)
			}
		})
	}
	wg.Wait()
	after := f.arrived(t)
	apid, gateway := after["apid"]-before["apid"], after["gateway"]-before["gateway"]
	refused := f.figures(t, "connections_refused_total")
	t.Logf("» %d connections dialled in %s, %d failed, at most %d open at once on the host; the node counted %.0f at apid and %.0f at gateway, and had no place for %.0f and %.0f",
		min(dialled.Load(), total), time.Since(start).Round(time.Second), failed.Load(), most.Load(), apid, gateway, refused["apid"]-turned["apid"], refused["gateway"]-turned["gateway"])
	if apid < total/4 || gateway < total/4 {
		t.Errorf("of %d connections only %.0f reached apid and %.0f gateway: this floods something else", total, apid, gateway)
	}
}

// arrived returns how many connections each door was handed since it started, by its own figures.
func (f *flood) arrived(t *testing.T) map[string]float64 {
	t.Helper()
	return f.figures(t, "connections_accepted_total")
}

// figures returns one figure of each door.
func (f *flood) figures(t *testing.T, name string) map[string]float64 {
	t.Helper()
	out := map[string]float64{}
	var text string
	eventually(t, 20*time.Second, "/metrics is read", func() error {
		code, body, err := f.n.get(t, "/metrics", f.admin)
		if err == nil && code != 200 {
			err = fmt.Errorf("status %d", code)
		}
		text = body
		return err
	})
	for line := range strings.Lines(text) {
		for _, d := range []string{"apid", "gateway"} {
			if rest, ok := strings.CutPrefix(line, "bulkhead_"+d+"_"+name+"{"); ok {
				_, value, _ := strings.Cut(strings.TrimSpace(rest), " ")
				n, err := strconv.ParseFloat(value, 64)
				if err != nil {
					t.Errorf("%s: %v", line, err)
				}
				out[d] = n
			}
		}
	}
	if len(out) != 2 {
		t.Errorf("/metrics has %s of %d doors, want 2", name, len(out))
	}
	return out
}
