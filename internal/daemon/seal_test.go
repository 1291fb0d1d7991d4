package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/landlock"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// sealedKey has this program be the child of TestSeal, in a folder.
const sealedKey = "BULKHEAD_TEST_SEALED"

func TestMain(m *testing.M) {
	if dir := os.Getenv(sealedKey); dir != "" {
		os.Exit(sealedChild(dir))
	}
	os.Exit(m.Run())
}

// sealedChild seals itself, and reads on several threads what it may not read from then on.
func sealedChild(dir string) int {
	const threads = 4
	read := func(name string) error { _, err := os.ReadFile(filepath.Join(dir, name)); return err }
	ask, answers := make(chan string), make(chan error)
	var up sync.WaitGroup
	for range threads {
		up.Add(1)
		go func() {
			runtime.LockOSThread() // threads that are there before
			up.Done()
			for name := range ask {
				answers <- read(name)
			}
		}()
	}
	up.Wait()
	everywhere := func(name string, want error) bool {
		for range threads { // each is busy until its answer is taken
			ask <- name
		}
		ok := true
		for range threads {
			ok = ok && errors.Is(<-answers, want)
		}
		return ok && errors.Is(read(name), want)
	}
	log := NewLog(os.Stderr, "sealed")
	if !everywhere("other/file", nil) {
		log.Error("not all can be read before")
		return 1
	}
	os.Stdout.Close() // it has begun
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	seal(ctx, log)
	if !everywhere("other/file", fs.ErrPermission) || !everywhere("volume/mine/file", nil) || !everywhere("volume/other/file", fs.ErrPermission) {
		log.Error("a thread reads what it may not, or cannot read what it may")
		return 1
	}
	if err := os.WriteFile(filepath.Join(dir, "volume/mine/file"), []byte("x"), 0o600); err != nil {
		log.Error("its own file", "err", err.Error())
		return 1
	}
	return 0
}

// TestSeal: when its volume is there, and not before, a process keeps itself from all other files, on every thread; and one that cannot does not go on.
func TestSeal(t *testing.T) {
	if _, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, 1); errno != 0 {
		t.Skipf("this kernel has no Landlock: %v", errno)
	}
	// Threads of C code, which this program may have, cannot be sealed.
	program := filepath.Join(t.TempDir(), "program")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	child := func(t *testing.T, dir, rules string) (said *bytes.Buffer, cmd *exec.Cmd) {
		folder(t, filepath.Join(dir, "other"))
		said, cmd = &bytes.Buffer{}, exec.CommandContext(t.Context(), program)
		cmd.Env = append(os.Environ(), sealedKey+"="+dir, unit.VolumeEnv+"="+filepath.Join(dir, "volume"), unit.RulesEnv+"="+rules)
		cmd.Stderr = said
		return said, cmd
	}
	t.Run("sealed", func(t *testing.T) {
		dir := t.TempDir()
		said, cmd := child(t, dir, landlock.Text([]unit.Rule{{Access: landlock.Files, Path: filepath.Join(dir, "volume/mine")}, {Access: unix.LANDLOCK_ACCESS_FS_READ_FILE, Path: "/proc"}}))
		begun, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err == nil {
			_, err = io.Copy(io.Discard, begun) // until the child closes it
		}
		if err != nil {
			t.Fatal(err)
		}
		made := filepath.Join(dir, "made") // appears whole, as a mount does
		folder(t, filepath.Join(made, "other"))
		folder(t, filepath.Join(made, "mine"))
		if err := os.Rename(made, filepath.Join(dir, "volume")); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, said)
		}
	})
	t.Run("it cannot", func(t *testing.T) {
		said, cmd := child(t, t.TempDir(), "nonsense")
		err := cmd.Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).ExitStatus() != unit.NotConfined {
			t.Errorf("it ended with %v, want exit %d: %s", err, unit.NotConfined, said)
		}
	})
}

// folder makes one with a file.
func folder(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o600)); err != nil {
		t.Fatal(err)
	}
}
