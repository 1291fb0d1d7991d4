package machine

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// A story is what a node went through while its disk was recorded, and all that is needed to look at the disk at any moment of it. It lies in a
// folder, so that a recording can be looked at again.
type story struct {
	dir string

	Machine  qemu.Machine
	Marks    []mark            // in order
	TPM      []snapshot        // the same
	Kernels  map[string]string // SHA-256 of the kernel images there are, with their versions
	Recovery []string
	Applied  []string // documents, by generation; the first is ""
}

// A mark is the moment at which something began, and what a power cut may leave until the next one.
type mark struct {
	Name  string
	Log   int64  // length of the log then
	Where string // for messages; "" is Name
	// Versions are those of which one must start, Generations those of which one must be there; 0 is none.
	Versions    []string
	Generations []uint64
	// Owned is set where the owner must be known.
	Owned bool
}

// A snapshot is what the TPM and the firmware kept from a moment on.
type snapshot struct {
	Log int64
	Dir string
}

// Files of a story's folder.
const (
	storyFile = "story.json"
	baseFile  = "base.raw" // the disk before the machine was powered on
	logFile   = "record"
	endFile   = "disk.raw" // the disk as the machine left it
)

// rest is before the name of what was done last, while nothing is done.
const rest = "after "

const (
	firstVersion, secondVersion = "9.0.0", "9.1.0"
)

func loadStory(t *testing.T, dir string) *story {
	t.Helper()
	s := &story{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, storyFile))
	if err == nil {
		err = json.Unmarshal(data, s)
	}
	if err != nil {
		t.Fatalf("story: %v", err)
	}
	return s
}

// recordStory lets a node live: first configuration, another one, keys replaced, an upgrade, and back. It returns with the machine off.
func recordStory(t *testing.T, n *node) *story {
	s := &story{dir: n.machineDir(), Kernels: map[string]string{}, Applied: []string{""}}
	bundles := map[string]string{}
	for _, v := range []string{firstVersion, secondVersion} {
		bundles[v] = n.bundleOf(t, poison{}, v, false)
		kernel, err := os.ReadFile(filepath.Join(filepath.Dir(bundles[v]), "bulkhead.efi"))
		if err != nil {
			t.Fatal(err)
		}
		s.Kernels[fmt.Sprintf("%x", sha256.Sum256(kernel))] = v
	}
	m, err := qemu.New(n.name)
	if err != nil {
		t.Fatal(err)
	}
	m.Memory, m.CPUs, m.Firmware, m.SecureBoot, m.TPM, m.Record = 2048, secureCPUs, qemu.UEFI, true, true, logFile
	m.Forwards = []qemu.Forward{{Name: "api", Host: n.apiPort, Guest: 50000}, {Name: "gateway", Host: n.gatewayPort, Guest: 50001}, {Name: "kubernetes", Host: n.kubePort, Guest: 6443}}
	if err := m.Create(filepath.Dir(bundles[firstVersion]), []byte(cutKey)); err != nil {
		t.Fatal(err)
	}
	if out, err := n.shell(t, "", "cp", "--sparse=always", filepath.Join(s.dir, endFile), filepath.Join(s.dir, baseFile)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.Machine = m
	if err := s.Machine.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	stop := s.watchTPM(t)
	defer stop()
	s.live(t, n, bundles[secondVersion])
	n.off(t, s.Machine)
	stop()
	s.save(t, n)
	return s
}

// live is the story itself.
func (s *story) live(t *testing.T, n *node, upgrade string) {
	both := []string{firstVersion, secondVersion}
	now := mark{Versions: both[:1], Generations: []uint64{0, 1}}
	do := func(name string, may mark, f func()) { // what f does, and then a rest in which only its outcome is right
		t.Helper()
		s.mark(t, name, may)
		f()
		now = may
		now.Versions, now.Generations, now.Owned = may.Versions[len(may.Versions)-1:], may.Generations[len(may.Generations)-1:], true
		s.mark(t, rest+name, now)
	}
	do("install", now, func() { s.apply(t, n, "up") })
	n.encrypted(t)
	for range 2 {
		may := now
		may.Generations = []uint64{now.Generations[0], now.Generations[0] + 1}
		do(fmt.Sprintf("config apply %d", now.Generations[0]+1), may, func() { s.apply(t, n, "apply") })
	}
	do("key rotation", now, func() { s.rotate(t, n) })
	for _, to := range []string{secondVersion, firstVersion} {
		may := now
		if may.Versions = both; to == firstVersion {
			may.Versions = []string{secondVersion, firstVersion}
			do("rollback", may, func() { n.run(t, "bhctl", "rollback", "--no-reboot") })
		} else {
			do("upgrade", may, func() {
				if out, err := n.try(t.Context(), 5*time.Minute, "bhctl", "upgrade", "--no-reboot", "--image", upgrade); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			})
		}
		// Firmware renames the kernel to count the try. It does so in several writes, between which the old version may be what is left.
		do("first start of "+to, may, func() { n.rebootUnasked(t, s.Machine) })
		do("mark "+to+" good", now, func() { n.foundGood(t, to) })
	}
}

// apply gives the node its next document.
func (s *story) apply(t *testing.T, n *node, with string) {
	t.Helper()
	document := fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: cut-%d\n---\napiVersion: bulkhead.dev/v1\nkind: Update\nhealth: [api, config]\n", len(s.Applied))
	file := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(file, []byte(document), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"apply", "-f", file}
	if with == "up" {
		args = []string{"up", "--no-bootstrap", "--name", n.name, "--firmware", "uefi", "--secure-boot", "--tpm", "-f", file}
	}
	out, err := n.try(t.Context(), 5*time.Minute, "bhctl", args...)
	if err != nil {
		t.Fatalf("bhctl %s: %v", with, err)
	}
	s.Applied = append(s.Applied, document)
	s.learnRecovery(t, out, with == "up")
}

// learnRecovery remembers the recovery key that bhctl shows.
func (s *story) learnRecovery(t *testing.T, out string, must bool) {
	t.Helper()
	if key := recoveryKey.FindStringSubmatch(out); key != nil {
		s.Recovery = append(s.Recovery, key[1])
	} else if must {
		t.Fatalf("no recovery key is shown:\n%s", out)
	}
}

// rotate replaces both keys of STATE: the TPM's and the one for people.
func (s *story) rotate(t *testing.T, n *node) {
	t.Helper()
	for _, kind := range []string{"tpm", "recovery"} {
		id := regexp.MustCompile(`(?m)^(\S+) +STATE +` + kind + `\b`).FindStringSubmatch(n.run(t, "bhctl", "storage", "keys", "list"))
		if id == nil {
			t.Fatalf("STATE has no key of the kind %s", kind)
		}
		out := n.run(t, "bhctl", "storage", "keys", "rotate", id[1])
		s.learnRecovery(t, out, kind == "recovery")
	}
}

// rebootUnasked restarts the node and waits until it can be called, without calling it: a call with credentials would be a proof of its health.
func (n *node) rebootUnasked(t *testing.T, m qemu.Machine) {
	t.Helper()
	boots := func() int {
		text, err := os.ReadFile(m.Console())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), reached)
	}
	before := boots()
	n.run(t, "bhctl", "reboot")
	eventually(t, 5*time.Minute, "the node is back", func() error {
		if boots() == before {
			return errors.New("its kernel has not started")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", n.apiPort))
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// foundGood asks the node until it runs a version and has found it good.
func (n *node) foundGood(t *testing.T, version string) {
	t.Helper()
	line := regexp.MustCompile(`(?m)^[AB] +` + regexp.QuoteMeta(version) + ` +good +yes`)
	eventually(t, 5*time.Minute, version+" is found good", func() error {
		if _, err := n.try(t.Context(), 20*time.Second, "bhctl", "version"); err != nil { // the proof that the API answers
			return err
		}
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "get", "slots")
		if err == nil && !line.MatchString(out) {
			err = fmt.Errorf("slots:\n%s", out)
		}
		return err
	})
}

// mark says what begins now.
func (s *story) mark(t *testing.T, name string, m mark) {
	t.Helper()
	fi, err := os.Stat(filepath.Join(s.dir, logFile))
	if err != nil {
		t.Fatal(err)
	}
	m.Name, m.Log = name, fi.Size()
	s.Marks = append(s.Marks, m)
}

// watchTPM keeps what the TPM keeps, each time it changes, until stop is called. Its state is one small file, which is replaced whole; a copy that comes some
// milliseconds late is as if the TPM had been a little slower.
func (s *story) watchTPM(t *testing.T) (stop func()) {
	const name = "tpm2-00.permall"
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	look := func(last []byte) ([]byte, error) {
		fi, err := os.Stat(filepath.Join(s.dir, logFile))
		if err != nil {
			return last, err
		}
		state, err := os.ReadFile(filepath.Join(s.dir, qemu.TPMFolder, name))
		if errors.Is(err, fs.ErrNotExist) { // not yet
			return last, nil
		}
		if err != nil || string(state) == string(last) {
			return last, err
		}
		dir := fmt.Sprintf("at-%d", len(s.TPM))
		vars, err := os.ReadFile(filepath.Join(s.dir, qemu.VarsFile))
		if err = errors.Join(err, os.MkdirAll(filepath.Join(s.dir, dir, qemu.TPMFolder), 0o700)); err == nil {
			err = errors.Join(os.WriteFile(filepath.Join(s.dir, dir, qemu.TPMFolder, name), state, 0o600), os.WriteFile(filepath.Join(s.dir, dir, qemu.VarsFile), vars, 0o600))
		}
		s.TPM = append(s.TPM, snapshot{fi.Size(), dir})
		return state, err
	}
	go func() {
		var last []byte
		var err error
		for ctx.Err() == nil && err == nil {
			last, err = look(last)
			wait(ctx, 10*time.Millisecond)
		}
		done <- err
	}()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the TPM cannot be watched: %v", err)
		}
		done <- nil
	}
}

// save makes the folder complete.
func (s *story) save(t *testing.T, n *node) {
	t.Helper()
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	credentials, err := os.ReadFile(filepath.Join(n.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{storyFile: text, "config.yaml": credentials} {
		if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
