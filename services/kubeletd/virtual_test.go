package kubeletd

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/vip"
)

// shelf is etcdd's store with one key and networkd's virtual addresses; package vip has the tests of how they break.
type shelf struct {
	storev1.StoreClient
	networkv1.VirtualClient

	mu       sync.Mutex
	value    string   // guarded by mu; "": there is no key
	revision uint64   // guarded by mu
	held     []string // guarded by mu
}

func (s *shelf) Read(context.Context, *storev1.ReadRequest, ...grpc.CallOption) (*storev1.ReadResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.value == "" {
		return &storev1.ReadResponse{}, nil
	}
	return &storev1.ReadResponse{Entries: []*storev1.Entry{{Key: vip.Key, Value: []byte(s.value), Revision: s.revision}}}, nil
}

func (s *shelf) Write(_ context.Context, w *storev1.WriteRequest, _ ...grpc.CallOption) (*storev1.WriteResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	s.value = string(w.GetChanges()[0].GetValue())
	return &storev1.WriteResponse{Revision: s.revision}, nil
}

func (s *shelf) Hold(_ context.Context, r *networkv1.HoldRequest, _ ...grpc.CallOption) (*networkv1.HoldResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = r.GetAddresses()
	return &networkv1.HoldResponse{}, nil
}

func (s *shelf) has(key string, held ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.value == key && slices.Equal(s.held, held)
}

// A control plane has the document's virtual addresses while its own API server is ready; a worker never.
func TestVirtualAddresses(t *testing.T) {
	t.Parallel()
	const addresses = "virtualIPs: [10.5.0.100, \"fd00::100\"]\n"
	ca := testca.New(t)
	api := newAPIServer(t, ca)
	s, none := &shelf{}, &shelf{}
	cp, worker := newWorld(t, ca, api, clusterNode("cp", "controlplane", "127.0.0.1")), newWorld(t, ca, api, clusterNode("cp", "controlplane", "127.0.0.1"))
	cp.store, cp.virtual, worker.store, worker.virtual = s, s, none, none
	d := cp.run(controlPlaneDocument + addresses)
	worker.run(workerDocument + addresses)
	cp.until(d, "the addresses are here", func() bool { return s.has(`{"holder":"cp"}`, "10.5.0.100", "fd00::100") })
	api.mu.Lock()
	api.unready = true
	api.mu.Unlock()
	cp.until(d, "they are given up, for the API server is not ready", func() bool { return s.has("") })
	api.mu.Lock()
	api.unready = false
	api.mu.Unlock()
	cp.until(d, "they are here again", func() bool { return s.has(`{"holder":"cp"}`, "10.5.0.100", "fd00::100") })
	without, err := parse([]byte(controlPlaneDocument))
	if err == nil {
		err = d.loop.Set(2, without)
	}
	if err != nil {
		t.Fatal(err)
	}
	cp.until(d, "the document has none any more", func() bool { return s.has("") })
	if !none.has("") || none.revision > 0 {
		t.Error("a worker took the virtual addresses")
	}
}

// With an IPv6 address among them the API server must listen to that family too.
func TestVirtualAddressesBind(t *testing.T) {
	for _, c := range []struct{ addresses, want string }{{"[10.5.0.100]", "--bind-address=0.0.0.0"}, {`["fd00::100"]`, "--bind-address=::"}} {
		want, err := parse([]byte(controlPlaneDocument + "virtualIPs: " + c.addresses + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		want.Node = "n1" // whose boot it is that grow tells
		files, err := render(want, grow(t, want, func(string) {}))
		if err != nil {
			t.Fatal(err)
		}
		at := slices.IndexFunc(files, func(f File) bool { return strings.HasSuffix(f.Path, "kube-apiserver/args") })
		if at < 0 || !strings.Contains(files[at].Text, c.want+"\n") {
			t.Errorf("%s: the API server does not listen with %s", c.addresses, c.want)
		}
	}
}
