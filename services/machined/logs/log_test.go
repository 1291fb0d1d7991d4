package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func open(t *testing.T, path string) *Log {
	t.Helper()
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// texts reads a log without following it.
func texts(t *testing.T, l *Log, tail uint32) []string {
	t.Helper()
	var out []string
	if err := l.Stream(t.Context(), tail, false, func(line Line) error { out = append(out, line.Text); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTail(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "a"))
	if got := texts(t, l, 5); got != nil {
		t.Errorf("an empty log has %q", got)
	}
	l.Append(time.Unix(1, 0), "one", "two")
	l.Append(time.Unix(2, 0), "", "four")
	for tail, want := range map[uint32][]string{
		0: {"one", "two", "", "four"}, 1: {"four"}, 3: {"two", "", "four"}, 4: {"one", "two", "", "four"}, 1 << 31: {"one", "two", "", "four"},
	} {
		if got := texts(t, l, tail); !reflect.DeepEqual(got, want) {
			t.Errorf("tail %d: got %q, want %q", tail, got, want)
		}
	}
}

func TestSurvivesItsProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	l := open(t, path)
	for i := range 40 { // more than two segments
		l.Append(time.Unix(int64(i), 0), strings.Repeat("x", MaxLine)+fmt.Sprint(i), fmt.Sprintf("%d %s", i, strings.Repeat("y", 16000)))
	}
	before := texts(t, l, 0)
	l.Close()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("1234 half a rec"); err != nil { // killed while it wrote
		t.Fatal(err)
	}
	f.Close()
	again := open(t, path)
	if got := texts(t, again, 0); !reflect.DeepEqual(got, before) {
		t.Errorf("got %d lines, want %d", len(got), len(before))
	}
	again.Append(time.Unix(99, 0), "new")
	if got := texts(t, again, 2); got[1] != "new" || got[0] != before[len(before)-1] {
		t.Errorf("got %.40q", got)
	}
	var size int64
	for _, name := range []string{path, path + ".old"} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > 2*(SegmentSize+maxRecord) {
		t.Errorf("the files hold %d bytes", size)
	}
}

// TestFollow: a reader that keeps up sees each line once, in order, over many rotations.
func TestFollow(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "a"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const lines = 3000
	for i := range 10 {
		l.Append(time.Now(), fmt.Sprint(i, " "))
	}
	progress := make(chan int, 1)
	done := make(chan error, 1)
	next := 5 // the tail
	go func() {
		done <- l.Stream(ctx, 5, true, func(line Line) error {
			var n int
			if _, err := fmt.Sscan(line.Text, &n); err != nil || n != next {
				return fmt.Errorf("got %.40q, want %d", line.Text, next)
			}
			next++
			if next%100 == 0 || next == 10 {
				progress <- next
			}
			if next == lines {
				cancel()
			}
			return nil
		})
	}()
	if n := <-progress; n != 10 {
		t.Fatalf("progress %d", n)
	}
	for i := 10; i < lines; i++ {
		l.Append(time.Now(), fmt.Sprint(i, " ", strings.Repeat("z", 1000)))
		if (i+1)%100 == 0 {
			<-progress // 100 KiB at most behind: that is not slow
		}
	}
	if err := <-done; !errors.Is(err, context.Canceled) || next != lines {
		t.Errorf("after %d lines: %v", next, err)
	}
}

// TestSlowReader: it delays nobody, is told what it lost, and sees the end.
func TestSlowReader(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "a"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l.Append(time.Now(), "first")
	begun, slow := make(chan bool), make(chan bool)
	var got []string
	done := make(chan error, 1)
	go func() {
		done <- l.Stream(ctx, 0, true, func(line Line) error {
			got = append(got, line.Text)
			if line.Text == "first" {
				close(begun)
				<-slow
			}
			if line.Text == "last" {
				cancel()
			}
			return nil
		})
	}()
	<-begun
	for i := range 400 {
		l.Append(time.Now(), fmt.Sprint(i, strings.Repeat("z", 8000)))
	}
	l.Append(time.Now(), "last")
	close(slow)
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if len(got) < 50 || !strings.Contains(got[1], "bytes of log are lost") || got[len(got)-1] != "last" {
		t.Errorf("got %d lines, second %.80q", len(got), got[1])
	}
}

func TestCopy(t *testing.T) {
	long := strings.Repeat("é", MaxLine)
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader,
	} {
		l := open(t, filepath.Join(t.TempDir(), "a"))
		in := "one\n\ntwo \xff\n" + long + "\nexact" + strings.Repeat("x", MaxLine-5) + "\nrest"
		if err := l.Copy(wrap(strings.NewReader(in)), func() time.Time { return time.Unix(7, 0) }); err != io.EOF {
			t.Fatal(err)
		}
		got := texts(t, l, 0)
		if len(got) != 6 || got[0] != "one" || got[1] != "" || got[2] != "two ?" || got[5] != "rest" || got[4] != "exact"+strings.Repeat("x", MaxLine-5) {
			t.Fatalf("%s: got %d lines, %.60q", name, len(got), got)
		}
		if cut := got[3]; len(cut) > MaxLine || len(cut) < MaxLine-4 || !strings.HasSuffix(cut, "é…") {
			t.Errorf("%s: the long line has %d bytes and ends in %q", name, len(cut), cut[len(cut)-8:])
		}
	}
}

func TestKernelLine(t *testing.T) {
	boot := time.Unix(1000, 0)
	for in, want := range map[string]Line{
		"<6>[   12.500000] eth0: up":       {boot.Add(12500 * time.Millisecond), "eth0: up"},
		"<3>[    0.000001] bad [thing] x]": {boot.Add(time.Microsecond), "err: bad [thing] x]"},
		"<30>[    1.0] init: hello":        {boot.Add(time.Second), "init: hello"},
		"no head":                          {boot, "no head"},
		"<4>no stamp":                      {boot, "warning: no stamp"},
	} {
		if got := kernelLine(in, boot); got != want {
			t.Errorf("%q: got %+v, want %+v", in, got, want)
		}
	}
}

func TestKernelStream(t *testing.T) {
	ring := "<6>[ 1.0] a\n<6>[ 2.0] b\n<6>[ 3.0] c\n"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	k := &Kernel{
		Size: func() (int, error) { return 4096, nil }, Boot: func() time.Time { return time.Unix(0, 0) },
	}
	// What the ring holds at each further look: more, the same, more, and all else after an overflow.
	next := []string{ring + "<6>[ 4.0] d\n", ring + "<6>[ 4.0] d\n", ring + "<6>[ 4.0] d\n<6>[ 5.0] e\n<6>[ 5.0] e\n", "<6>[ 9.0] z\n"}
	k.Read = func(b []byte) (int, error) {
		n := copy(b, ring)
		if len(next) > 0 {
			ring, next = next[0], next[1:]
		}
		return n, nil
	}
	var got string
	err := k.Stream(ctx, 2, true, time.Millisecond, func(l Line) error {
		if got += l.Text; l.Text == "z" {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || got != "bcdeez" {
		t.Errorf("got %q, %v; want b c d e e z", got, err)
	}
	if k.buf != nil {
		t.Error("the buffer is kept though nobody reads")
	}
}
