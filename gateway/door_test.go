package gateway

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"testing"
	"time"
)

// raw writes a request as it is and reads the answer, for which the node may not wait for more.
func raw(t *testing.T, address, request string) (int, string) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	go func() { _, _ = io.WriteString(c, request) }()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("no answer to %.200q: %v", request, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// TestBodies: nothing of a stranger's body is waited for, and nobody's may be longer than allowed.
func TestBodies(t *testing.T) {
	address := serve(t).Listener.Addr().String()
	const head = "POST /v1/config:apply HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
	doc := func(n int) string { return `{"documents":"` + strings.Repeat("#", n) + `"}` }
	chunk := func(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }
	for _, c := range []struct {
		name, request string
		status        int
		want          string
	}{
		{"no token, no body sent", head + "Content-Length: 100\r\n\r\n", 401, "no valid credential"},
		{"wrong token, no body sent", head + "Authorization: Bearer bad\r\nContent-Length: 100\r\n\r\n", 401, "no valid credential"},
		{"no token, no end", head + "Transfer-Encoding: chunked\r\n\r\n", 401, "UNAUTHENTICATED"},
		{"good", head + "Authorization: Bearer good\r\nContent-Length: 21\r\n\r\n" + doc(5), 200, `"generation":"5"`},
		{"too large", head + "Authorization: Bearer good\r\nContent-Length: 5000000\r\n\r\n", 413, "allowed are 4194304 bytes"},
		{"too large, length not told", head + "Authorization: Bearer good\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(doc(maxBody)), 413, "RESOURCE_EXHAUSTED"},
	} {
		if code, body := raw(t, address, c.request); code != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s: %d %.300s, want %d with %q", c.name, code, body, c.status, c.want)
		}
	}
}

// TestStrangersMakeRoom: who showed a good token stays when strangers take all places.
func TestStrangersMakeRoom(t *testing.T) {
	h := serve(t)
	good := map[string]string{"Authorization": "Bearer good"}
	if resp, _ := do(t, "GET", h.URL+"/v1/version", good); resp.StatusCode != 200 {
		t.Fatalf("%d", resp.StatusCode)
	}
	for range 20 { // the test's gate has 4 places
		c, err := net.Dial("tcp", h.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	var reused bool
	req, err := http.NewRequestWithContext(withTrace(t, &reused), "GET", h.URL+"/v1/version", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer good")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 || !reused {
		t.Errorf("status %d, on the old connection: %v", resp.StatusCode, reused)
	}
}

// withTrace notes whether the request went out on a connection that was open already.
func withTrace(t *testing.T, reused *bool) context.Context {
	return httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { *reused = i.Reused }})
}
