// Command hello is the workload that demonstrations and tests run: a web server
// that says which pod answered, and a few questions asked from inside a pod.
// The image holds this file and nothing else, so it stands in for a shell too:
//
//	hello              serve on :8080, one line of log a request
//	hello get URL      print the body; the exit code is 1 unless the status is 2xx
//	hello lookup NAME  print the addresses, as the pod's resolv.conf finds them
//	hello env          print the environment, sorted
//
// and for tests of the node itself, in a privileged pod that sees its processes:
//
//	hello read FILE OFFSET LENGTH   print that many bytes of a file or device
//	hello kill PID                  end a process with SIGKILL
//	hello prowl DIR                 look for ways out of the pod, which has the host's root at DIR, and print them, as JSON
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	address  = ":8080"
	patience = 10 * time.Second // for one question; longer than a resolver's two tries
	maxBody  = 1 << 20          // bytes of an answer that get prints
	usage    = "usage: hello [get URL | lookup NAME | env | read FILE OFFSET LENGTH | kill PID | prowl DIR]"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "hello:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer, args []string) error {
	switch {
	case len(args) == 0:
		return serve(ctx, out)
	case len(args) == 2 && args[0] == "get":
		return get(ctx, out, args[1])
	case len(args) == 2 && args[0] == "lookup":
		return lookup(ctx, out, args[1])
	case len(args) == 1 && args[0] == "env":
		for _, line := range slices.Sorted(slices.Values(os.Environ())) {
			fmt.Fprintln(out, line)
		}
		return nil
	case len(args) == 4 && args[0] == "read":
		return read(out, args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "kill":
		return kill(args[1])
	case len(args) == 2 && args[0] == "prowl":
		return prowl(out, args[1])
	}
	return errors.New(usage)
}

// serve answers until ctx is done, then lets open requests finish, so that a
// rolling update loses none.
func serve(ctx context.Context, out io.Writer) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "hello: %s serves on %s\n", host, address)
	s := http.Server{Handler: handler(host, out), ReadHeaderTimeout: patience}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		stopped <- s.Shutdown(last)
	}()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}

// handler answers every path alike. Requests are counted from 1.
func handler(host string, out io.Writer) http.Handler {
	var count atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := count.Add(1)
		fmt.Fprintf(out, "%s %s from %s, request %d\n", r.Method, r.URL.EscapedPath(), r.RemoteAddr, n)
		fmt.Fprintf(w, "hello from %s, request %d\n", host, n)
	})
}

func get(ctx context.Context, out io.Writer, url string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(out, io.LimitReader(resp.Body, maxBody)); err != nil {
		return fmt.Errorf("get %s: read the body: %w", url, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("get %s: %s", url, resp.Status)
	}
	return nil
}

func lookup(ctx context.Context, out io.Writer, name string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	found, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	slices.Sort(found)
	for _, a := range found {
		fmt.Fprintln(out, a)
	}
	return nil
}
