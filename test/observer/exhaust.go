package main

import (
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// exhaust lowers a unit's memory limit below what it uses until the kernel has killed a process for that, and puts the limit back. It prints
// the limit at which that was.
func exhaust(w io.Writer, groups string, q url.Values) error {
	file := func(name string) (string, error) {
		v := url.Values{"unit": q["unit"], "file": {name}}
		return groupFile(groups, v)
	}
	limit, err := file("memory.max")
	if err != nil {
		return err
	}
	old, err := os.ReadFile(limit)
	if err != nil {
		return err
	}
	defer func() { _ = os.WriteFile(limit, old, 0) }() // it was so before
	before, err := kills(limit)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(limit), "memory.current"))
	if err != nil {
		return err
	}
	size, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return err
	}
	// What can be dropped is dropped first, so that it takes some steps.
	for size = size / 2; size > 128<<10; size = size * 3 / 4 {
		if err := os.WriteFile(limit, []byte(strconv.FormatUint(size, 10)), 0); err != nil {
			return err
		}
		for range 20 {
			now, err := kills(limit)
			if err != nil {
				return err
			}
			if now > before {
				_, err := fmt.Fprintln(w, size)
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return fmt.Errorf("%s lives with %d bytes", q.Get("unit"), size)
}

// kills is how many processes the kernel has killed for the limit.
func kills(limit string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(limit), "memory.events"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, fmt.Errorf("memory.events does not tell kills: %q", text)
}
