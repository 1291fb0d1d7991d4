package wired

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	containerregistry "github.com/google/go-containerregistry/pkg/registry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/services/updated"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

// machine is as much of machined as updated needs.
type machine struct {
	machinev1.UnimplementedMachineServer
	mu     sync.Mutex
	events []string // guarded by mu
	ready  bool     // guarded by mu
}

func (m *machine) GetHealth(context.Context, *machinev1.GetHealthRequest) (*machinev1.GetHealthResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := &machinev1.GetHealthResponse{}
	for _, name := range []string{"api.answered", "apid.up", "config.applied", "etcd.converged", "kubernetes.converged"} {
		out.Checks = append(out.Checks, &machinev1.Check{Name: name, Ok: m.ready})
	}
	return out, nil
}

func (m *machine) TellEvent(_ context.Context, r *machinev1.TellEventRequest) (*machinev1.TellEventResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events = append(m.events, r.GetText())
	return &machinev1.TellEventResponse{}, nil
}

func (*machine) ListBoots(context.Context, *machinev1.ListBootsRequest) (*machinev1.ListBootsResponse, error) {
	return &machinev1.ListBootsResponse{}, nil
}

func (m *machine) last() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.events) == 0 {
		return ""
	}
	return m.events[len(m.events)-1]
}

// updateNode is a claimed node with a disk that can be upgraded.
type updateNode struct {
	*node
	disk    *disk
	machine *machine
	client  updatev1.UpdateClient
	version string
}

func trusted() (bundle.Keys, error) { return bundle.Keys{release(1).Public().(ed25519.PublicKey)}, nil }

func newUpdateNode(t *testing.T, d *disk, version string) *updateNode {
	n := &updateNode{node: newNode(t), disk: d, machine: &machine{}, version: version}
	n.startTrustd()
	n.startApid()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	creds, err := client.Claim(ctx, n.address, n.console.code(t), "ann")
	n.must(err)
	conn, err := client.Dial(n.address, creds)
	n.must(err)
	t.Cleanup(func() { conn.Close() })
	n.client = updatev1.NewUpdateClient(conn)
	n.serve("machined", func(s *grpc.Server) { machinev1.RegisterMachineServer(s, n.machine) })
	return n
}

// serve is a daemon that is not under test here, behind its socket, for updated.
func (n *updateNode) serve(name string, register func(*grpc.Server)) (stop func()) {
	l := n.bind(name)
	s := grpc.NewServer(grpc.WaitForHandlers(true)) // one machine at a time has the disk; who may call is tested beside the services
	register(s)
	go func() { _ = s.Serve(l) }()
	n.t.Cleanup(s.Stop)
	return s.Stop
}

// boot starts storaged's part and updated, as after a restart into a version.
func (n *updateNode) boot(version string) (stop func()) {
	n.t.Helper()
	n.version = version
	for _, name := range []string{"storaged", "updated"} {
		_ = os.Remove(filepath.Join(n.dir, name))
	}
	stopSlots := n.serve("storaged", func(s *grpc.Server) {
		slotv1.RegisterSlotsServer(s, &slots.Server{Store: slots.New(slots.Config{Disk: n.disk, Keys: trusted, Epochs: slots.NoEpochs{},
			Architecture: "amd64", Version: version, Log: slog.New(slog.DiscardHandler)})})
	})
	dial := func(name string) *grpc.ClientConn {
		c, err := peer.Dial(filepath.Join(n.dir, name))
		n.must(err)
		n.t.Cleanup(func() { c.Close() })
		return c
	}
	folder := filepath.Join(n.dir, "updated-state")
	n.must(os.MkdirAll(folder, 0o700))
	env := n.env("updated", n.inherit(n.bind("updated")))
	d, err := updated.New(updated.Config{Env: env, Slots: slotv1.NewSlotsClient(dial("storaged")), Machine: machinev1.NewMachineClient(dial("machined")),
		Keys: trusted, Restart: func() error { return nil }, Uptime: func() time.Duration { return time.Second }, Folder: folder, GoodFile: folder + "/good", JudgedFile: folder + "/judged"})
	n.must(err)
	stopUpdated := n.run(d.Run)
	return func() { stopUpdated(); stopSlots() }
}

// upgrade runs one to its end.
func (n *updateNode) upgrade(ctx context.Context, r *updatev1.UpgradeRequest) (*updatev1.UpgradeProgress, error) {
	n.t.Helper()
	s, err := n.client.Upgrade(ctx, r)
	n.must(err)
	var last *updatev1.UpgradeProgress
	for {
		p, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return last, nil
		}
		if err != nil {
			return last, err
		}
		last = p
	}
}

// until waits for a status, through apid.
func (n *updateNode) until(ctx context.Context, what string, ok func(*updatev1.Status) bool) *updatev1.Status {
	n.t.Helper()
	for {
		st, err := n.client.GetStatus(ctx, &updatev1.GetStatusRequest{})
		if err == nil && ok(st) {
			return st
		}
		select {
		case <-ctx.Done():
			n.t.Fatalf("waiting for %s: %v, %v", what, st, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func serveContent(t *testing.T, b []byte) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "bundle", time.Unix(1, 0), bytes.NewReader(b))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func url(u string) *updatev1.UpgradeRequest {
	return &updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: u}}
}

// TestUpgradeToGoodAndBack is the way of a version from a server into a slot, over a restart, to being found good, and back; all that the operator
// says and sees goes through apid.
func TestUpgradeToGoodAndBack(t *testing.T) {
	one, two, three := makeImage(t, 11, mib), makeImage(t, 12, mib), makeImage(t, 13, mib)
	n := newUpdateNode(t, newDisk(t, one, "0.1.0", 0), "0.1.0")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	stop := n.boot("0.1.0")
	head, data := two.bundle(t, "0.2.0", release(1), nil)
	p, err := n.upgrade(ctx, url(serveContent(t, data)))
	if err != nil || p.GetVersion() != "0.2.0" || p.GetStep() != "done" {
		t.Fatalf("upgrade: %v, %v", p, err)
	}
	if most := uint64(mib + 500_000); p.GetFetchBytes() > most || p.GetImageBytes() != uint64(head.Manifest.Size()) {
		t.Errorf("%d of %d bytes were fetched, though the node has a mebibyte of them", p.GetFetchBytes(), p.GetImageBytes())
	}
	st := n.until(ctx, "the new slot", func(s *updatev1.Status) bool { return len(s.GetSlots()) == 2 && s.GetSlots()[1].GetNext() })
	if v := st.GetSlots()[1]; v.GetStatus() != "on trial" || v.GetTriesLeft() != 3 || !st.GetSlots()[0].GetRunning() || st.GetHistory()[0].GetBy() != "ann" {
		t.Errorf("installed: %v", st)
	}
	if e := n.machine.last(); !strings.HasPrefix(e, "0.2.0 was installed by ann from http://") {
		t.Errorf("event: %q", e)
	}

	stop() // the restart
	n.disk.running.Store(&two.root)
	stop = n.boot("0.2.0")
	st = n.until(ctx, "the trial", func(s *updatev1.Status) bool { return len(s.GetProofs()) == 5 })
	if st.GetSlots()[1].GetStatus() != "on trial" || !st.GetSlots()[1].GetRunning() {
		t.Errorf("on trial: %v", st)
	}
	thirdURL := serveContent(t, second(three.bundle(t, "0.3.0", release(1), nil)))
	if _, err := n.upgrade(ctx, url(thirdURL)); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "on trial") {
		t.Errorf("an upgrade during the trial: %v", err)
	}
	n.machine.mu.Lock()
	n.machine.ready = true
	n.machine.mu.Unlock()
	n.until(ctx, "good", func(s *updatev1.Status) bool { return s.GetSlots()[1].GetStatus() == "good" && len(s.GetProofs()) == 0 })

	r, err := n.client.Rollback(ctx, &updatev1.RollbackRequest{})
	if err != nil || r.GetVersion() != "0.1.0" || !r.GetRestart() {
		t.Errorf("rollback: %v, %v", r, err)
	}
	stop()
	n.disk.running.Store(&one.root)
	stop = n.boot("0.1.0")
	st = n.until(ctx, "the old version to be good", func(s *updatev1.Status) bool { return len(s.GetSlots()) == 2 && s.GetSlots()[0].GetStatus() == "good" })
	var story []string
	for _, h := range st.GetHistory() {
		story = append(story, h.GetWhat()+" "+h.GetVersion())
	}
	if got := strings.Join(story, ", "); !strings.HasPrefix(got, "good 0.1.0, ") || !strings.Contains(got, "rollback 0.1.0, good 0.2.0, started 0.2.0, installed 0.2.0") {
		t.Errorf("history: %s", got)
	}

	// The same from a registry.
	reg := httptest.NewServer(containerregistry.New(containerregistry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(reg.Close)
	head3, data3 := three.bundle(t, "0.3.0", release(1), nil)
	pushArtifact(t, reg.URL, head3, data3)
	p, err = n.upgrade(ctx, &updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Oci{Oci: strings.TrimPrefix(reg.URL, "http://") + "/bulkhead:0.3.0"}})
	if err != nil || p.GetVersion() != "0.3.0" {
		t.Errorf("from a registry: %v, %v", p, err)
	}
	if r, err := n.client.Rollback(ctx, &updatev1.RollbackRequest{}); err != nil || r.GetRestart() || r.GetVersion() != "0.1.0" {
		t.Errorf("cancel: %v, %v", r, err)
	}
	stop()
}

func second(_ bundle.Head, b []byte) []byte { return b }

// pushArtifact puts a bundle into a registry.
func pushArtifact(t *testing.T, base string, h bundle.Head, data []byte) {
	t.Helper()
	send := func(method, at string, body []byte) *http.Response {
		t.Helper()
		r, err := http.NewRequest(method, at, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		resp, err := http.DefaultClient.Do(r)
		if err != nil || resp.StatusCode >= 300 {
			t.Fatal(resp, err)
		}
		resp.Body.Close()
		return resp
	}
	layer := func(name string, b []byte) string {
		where := send("POST", base+"/v2/bulkhead/blobs/uploads/", nil).Header.Get("Location")
		if strings.HasPrefix(where, "/") {
			where = base + where
		}
		send("PUT", where+"?digest=sha256:"+bundle.Sum(b).String(), b)
		return fmt.Sprintf(`{"mediaType":"application/octet-stream","digest":"sha256:%s","size":%d,"annotations":{"org.opencontainers.image.title":%q}}`, bundle.Sum(b), len(b), name)
	}
	layers := []string{layer(bundle.ManifestName, h.Raw), layer(bundle.SignatureName, h.Signature)}
	for i, f := range h.Manifest.Files {
		layers = append(layers, layer(f.Name, data[h.Offsets()[i]:][:f.Size]))
	}
	send("PUT", base+"/v2/bulkhead/manifests/0.3.0", []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":`+layer("", []byte("{}"))+`,"layers":[`+strings.Join(layers, ",")+`]}`))
}

// TestUpgradeRefusals gives a node everything that it must not take. Each is refused with one clear reason, which is an event too, and the running
// system stays what it is.
func TestUpgradeRefusals(t *testing.T) {
	one, two := makeImage(t, 11, mib), makeImage(t, 12, mib)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	head, data := two.bundle(t, "0.2.0", release(1), nil)
	edited := func(edit func(*bundle.Image)) []byte { return second(two.bundle(t, "0.2.0", release(1), edit)) }
	flipped := func(at int64) []byte { b := bytes.Clone(data); b[at] ^= 1; return b }
	unsigned := func() []byte {
		b := bytes.Clone(data)
		at := bundle.HeadSize(len(head.Raw)) - 1024 // the header of the signature
		return append(b[:at:at], b[at+1024:]...)
	}
	// A tree that is not that of the root, both signed: what is written is what was sent, and still no slot that can be started.
	liar := two
	liar.files[bundle.Tree] = bytes.Clone(two.files[bundle.Tree])
	liar.files[bundle.Tree][5000] ^= 1
	large := makeImage(t, 14, 3*mib)
	for _, c := range []struct {
		what  string
		data  []byte
		spare int64 // bytes of the EFI partition that something else takes
		code  codes.Code
		want  string
	}{
		{"tampered", flipped(head.Offsets()[bundle.Root] + 1_500_000), 0, codes.InvalidArgument, "the bundle was changed after it was signed: chunk"},
		{"tampered manifest", bytes.Replace(data, []byte(`"0.2.0"`), []byte(`"0.2.1"`), 1), 0, codes.InvalidArgument, "the bundle was changed after it was signed: the signature is not"},
		{"unsigned", unsigned(), 0, codes.InvalidArgument, "the bundle is not signed"},
		{"foreign-signed", second(two.bundle(t, "0.2.0", release(2), nil)), 0, codes.InvalidArgument, "the bundle is signed by somebody else: it claims key"},
		{"older than the epoch", edited(func(i *bundle.Image) { i.Epoch = 1 }), 0, codes.FailedPrecondition, "0.2.0 is of epoch 1, this node takes only 2 and later"},
		{"wrong architecture", edited(func(i *bundle.Image) { i.Architecture = "arm64" }), 0, codes.FailedPrecondition, "0.2.0 is for the architecture arm64, this node is amd64"},
		{"needs a version in between", edited(func(i *bundle.Image) { i.Minimum = "0.1.5" }), 0, codes.FailedPrecondition, "upgrade to 0.1.5 first"},
		{"runs already", second(one.bundle(t, "0.1.0", release(1), nil)), 0, codes.FailedPrecondition, "0.1.0 runs already"},
		{"truncated", data[:len(data)/2], 0, codes.FailedPrecondition, "it is cut off"},
		{"too large", second(large.bundle(t, "0.4.0", release(1), nil)), 0, codes.FailedPrecondition, "0.4.0 is too large: root.squashfs has 4194304 bytes, a ROOT slot of this node has room for 3145728"},
		{"full ESP", data, 33*mib + 150_000, codes.FailedPrecondition, "0.2.0 is too large: bulkhead.efi has 201024 bytes, the EFI partition of this node has room for"},
		{"verity failure", second(liar.bundle(t, "0.2.0", release(1), nil)), 0, codes.Unknown, "slot B: the hash tree is wrong in the block at byte 4096"},
		{"no bundle", []byte("<html>"), 0, codes.InvalidArgument, "not an update bundle"},
	} {
		t.Run(c.what, func(t *testing.T) {
			d := newDisk(t, one, "0.1.0", c.spare)
			n := newUpdateNode(t, d, "0.1.0")
			defer n.boot("0.1.0")()
			before := bytes.Clone(d.Content())
			_, err := n.upgrade(ctx, url(serveContent(t, c.data)))
			if code := status.Code(err); code != c.code && !(c.code == codes.Unknown && code == codes.Internal) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s …%s…", err, c.code, c.want)
			}
			if e := n.machine.last(); !strings.Contains(e, "by ann") || !strings.Contains(e, c.want[:min(len(c.want), 20)]) {
				t.Errorf("event: %q", e)
			}
			st := n.until(ctx, "the slots", func(s *updatev1.Status) bool { return len(s.GetSlots()) == 2 })
			if a, b := st.GetSlots()[0], st.GetSlots()[1]; !a.GetRunning() || !a.GetNext() || a.GetStatus() != "good" || b.GetStatus() != "empty" {
				t.Errorf("afterwards: %v", st)
			}
			from, to := int64(mib+espSize), int64(mib+espSize+4*mib) // slot A
			if !bytes.Equal(before[from:to], d.Content()[from:to]) {
				t.Error("the running slot was written to")
			}
		})
	}
}

// TestUploadThroughTheDoor sends an image in pieces, as the node asks for them, through apid.
func TestUploadThroughTheDoor(t *testing.T) {
	one, two := makeImage(t, 11, mib), makeImage(t, 12, mib)
	n := newUpdateNode(t, newDisk(t, one, "0.1.0", 0), "0.1.0")
	defer n.boot("0.1.0")()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	head, data := two.bundle(t, "0.2.0", release(1), nil)
	s, err := n.client.Upload(ctx)
	n.must(err)
	n.must(s.Send(&updatev1.UploadRequest{Manifest: head.Raw, Signature: head.Signature}))
	sent, version := 0, ""
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		n.must(err)
		if p := m.GetProgress(); p.GetStep() == "done" {
			version = p.GetVersion()
		}
		for i, f := range head.Manifest.Files {
			if w := m.GetWant(); w.GetFile() == f.Name {
				sent += int(w.GetLength())
				n.must(s.Send(&updatev1.UploadRequest{Data: data[head.Offsets()[i]+int64(w.GetOffset()):][:w.GetLength()]}))
			}
		}
	}
	if version != "0.2.0" || sent == 0 || sent > mib+500_000 {
		t.Errorf("%q after %d bytes", version, sent)
	}
}
