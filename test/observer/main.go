// Command observer is the tests' hand inside a node: root with every capability, in the host's namespaces, which no program of a real image has. It shows the
// node's processes and does what breaks a daemon: signals, frozen groups, lowered limits, full volumes, flooded sockets.
//
// It is in no image but that of "make observer". It speaks plain HTTP on the port that PID 1 gives it and asks nobody who he is: the test forwards that
// port to itself alone. Everything that it holds (connections of a flood) ends with it; what it changed it does not change back by itself.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const groups = "/sys/fs/cgroup"

func main() {
	if len(os.Args) > 1 {
		log.Fatal("observer: it is started by PID 1 of a test's image, without arguments")
	}
	l, err := net.FileListener(os.NewFile(unit.FirstListener, "listener"))
	if err != nil {
		log.Fatal("observer: ", err)
	}
	log.Fatal("observer: ", http.Serve(l, routes(groups)))
}

// routes is what can be asked; each answer is text, and status 422 has the reason in words.
func routes(groups string) http.Handler {
	f := &flood{}
	m := http.NewServeMux()
	m.Handle("GET /ps", handler(func(w io.Writer, _ url.Values, _ string) error { return ps(w, "/proc", groups) }))
	m.Handle("POST /signal", handler(func(_ io.Writer, q url.Values, _ string) error { return send(groups, q) }))
	m.Handle("POST /restart", handler(func(_ io.Writer, q url.Values, _ string) error { return restart(q) }))
	m.Handle("GET /group", handler(func(w io.Writer, q url.Values, _ string) error {
		name, err := groupFile(groups, q)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(name)
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	}))
	m.Handle("PUT /group", handler(func(_ io.Writer, q url.Values, text string) error {
		name, err := groupFile(groups, q)
		if err != nil {
			return err
		}
		return os.WriteFile(name, []byte(text), 0)
	}))
	m.Handle("POST /exhaust", handler(func(w io.Writer, q url.Values, _ string) error { return exhaust(w, groups, q) }))
	m.Handle("POST /fill", handler(func(w io.Writer, q url.Values, _ string) error { return fill(w, q) }))
	m.Handle("DELETE /fill", handler(func(_ io.Writer, q url.Values, _ string) error { return empty(q.Get("volume")) }))
	m.Handle("POST /flood", handler(func(w io.Writer, q url.Values, _ string) error { return f.begin(w, q) }))
	m.Handle("DELETE /flood", handler(func(w io.Writer, _ url.Values, _ string) error { return f.end(w) }))
	m.Handle("GET /mounts", handler(func(w io.Writer, _ url.Values, _ string) error {
		text, err := os.ReadFile("/proc/1/mountinfo")
		if err == nil {
			_, err = w.Write(text)
		}
		return err
	}))
	return m
}

// handler answers with what do wrote, or with its error.
func handler(do func(w io.Writer, q url.Values, body string) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var out strings.Builder
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err == nil {
			err = do(&out, r.URL.Query(), string(body))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		_, _ = io.WriteString(w, out.String())
	})
}

// groupFile is a file of a unit's control group.
func groupFile(groups string, q url.Values) (string, error) {
	name, file := q.Get("unit"), q.Get("file")
	for _, s := range []string{name, file} {
		if s == "" || s == ".." || strings.ContainsRune(s, '/') {
			return "", fmt.Errorf("want unit=NAME and file=NAME, not %q and %q", name, file)
		}
	}
	return filepath.Join(group(groups, name), file), nil
}

// group is a unit's control group: below that of all units, or below the one that holds the workload side.
func group(groups, unit string) string {
	dir := filepath.Join(groups, "bulkhead", unit)
	if _, err := os.Stat(dir); err != nil {
		dir = filepath.Join(groups, "bulkhead/workload", unit)
	}
	return dir
}

// members are the processes of a unit's group and of all groups below it.
func members(groups, unit string) (pids []int, err error) {
	err = filepath.WalkDir(group(groups, unit), func(path string, e os.DirEntry, err error) error {
		if err != nil || e.Name() != "cgroup.procs" {
			return err
		}
		text, err := os.ReadFile(path)
		for _, s := range strings.Fields(string(text)) {
			n, _ := strconv.Atoi(s)
			pids = append(pids, n)
		}
		return err
	})
	slices.Sort(pids)
	return pids, err
}

// send signals one process (pid=), or every process of a unit's group (unit=).
func send(groups string, q url.Values) error {
	sig := unix.SignalNum("SIG" + q.Get("signal"))
	if sig == 0 {
		return fmt.Errorf("there is no signal %q; write KILL, STOP, CONT, TERM, …", q.Get("signal"))
	}
	var pids []int
	if q.Has("pid") {
		n, err := strconv.Atoi(q.Get("pid"))
		if err != nil {
			return err
		}
		pids = []int{n}
	} else {
		var err error
		if pids, err = members(groups, q.Get("unit")); err != nil {
			return err
		}
	}
	if len(pids) == 0 {
		return fmt.Errorf("%s has no process", q.Get("unit"))
	}
	var errs []error
	for _, n := range pids {
		if n <= 1 {
			return fmt.Errorf("%d is no process to signal", n)
		}
		if err := syscall.Kill(n, sig); err != nil && !(len(pids) > 1 && errors.Is(err, syscall.ESRCH)) {
			errs = append(errs, fmt.Errorf("signal %d: %w", n, err))
		}
	}
	return errors.Join(errs...)
}

// number reads a parameter; fallback if it is not there.
func number[T ~int | ~int64](q url.Values, name string, fallback T) (T, error) {
	if !q.Has(name) {
		return fallback, nil
	}
	n, err := strconv.ParseInt(q.Get(name), 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s: %q is no number", name, q.Get(name))
	}
	return T(n), nil
}

// printJSON writes one line.
func printJSON(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }
