package kubeletd

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testca"
)

type object = map[string]any

// apiServer is the part of Kubernetes' API server that kubeletd talks to: objects by path, versions, conflicts, watches, over TLS with client
// certificates. It grants everything and notes who did what.
type apiServer struct {
	url string

	mu      sync.Mutex
	objects map[string]object        // guarded by mu, as all below; by path
	version int                      // of the newest change
	watches map[chan object]struct{} // of Nodes
	calls   map[string]bool          // "user method path"
	held    chan struct{}            // closed to let PUTs through; nil: nobody waits
	waiting chan struct{}            // gets one for each PUT that waits
	unready bool                     // what /readyz says
	tls     *tls.Config
}

// newAPIServer serves until the test ends.
func newAPIServer(t testing.TB, ca *testca.CA) *apiServer {
	t.Helper()
	a := &apiServer{objects: map[string]object{}, watches: map[chan object]struct{}{}, calls: map[string]bool{}, waiting: make(chan struct{}, 16)}
	s := httptest.NewUnstartedServer(a)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // probes hang up
	a.certify(t, ca, ca)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.tls, nil
	}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("not asked") }}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	a.url = s.URL
	return a
}

// certify has it show a certificate of one authority and believe those of some.
func (a *apiServer) certify(t testing.TB, ca *testca.CA, believe ...*testca.CA) {
	t.Helper()
	cert, key := ca.PEM(t, "kube-apiserver-server", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, b := range believe {
		roots.AppendCertsFromPEM([]byte(b.State().GetKubernetesCa()))
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tls = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, NextProtos: []string{"h2", "http/1.1"}}
}

// put makes or replaces an object.
func (a *apiServer) put(path string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.set(path, o)
}

// set is put for who holds mu.
func (a *apiServer) set(path string, o object) {
	a.version++
	meta, _ := o["metadata"].(object)
	if meta == nil {
		meta = object{}
		o["metadata"] = meta
	}
	meta["resourceVersion"], meta["name"] = fmt.Sprint(a.version), path[strings.LastIndex(path, "/")+1:]
	kind := "MODIFIED"
	if a.objects[path] == nil {
		kind = "ADDED"
	}
	a.objects[path] = o
	a.tell(path, kind)
}

// tell is for who holds mu.
func (a *apiServer) tell(path, kind string) {
	if strings.HasPrefix(path, nodesPath+"/") {
		for w := range a.watches {
			w <- object{"type": kind, "object": copyOf(a.objects[path])}
		}
	}
}

// get returns a copy of an object; nil if there is none.
func (a *apiServer) get(path string) object {
	a.mu.Lock()
	defer a.mu.Unlock()
	return copyOf(a.objects[path])
}

func copyOf(o object) (out object) {
	data, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		panic(err)
	}
	return out
}

// by returns what users whose name has the prefix did, sorted, with paths cut after the resource.
func (a *apiServer) by(prefix string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for c := range a.calls {
		if rest, ok := strings.CutPrefix(c, prefix); ok {
			out = append(out, rest)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user := r.TLS.PeerCertificates[0].Subject.CommonName
	path := strings.TrimSuffix(strings.TrimSuffix(r.URL.Path, "/approval"), "/status")
	a.mu.Lock()
	a.calls[user+" "+r.Method+" "+path] = true
	held, unready := a.held, a.unready
	a.mu.Unlock()
	switch {
	case r.URL.Path == "/readyz" && unready:
		w.WriteHeader(http.StatusInternalServerError)
	case r.URL.Path == "/readyz":
		fmt.Fprint(w, "ok")
	case r.URL.Path == "/version":
		fmt.Fprint(w, `{"gitVersion": "v1.0.0"}`)
	case r.URL.Query().Get("watch") != "":
		a.watch(w, r)
	case path == "/api/v1/configmaps": // asked for by name, in all namespaces
		a.mu.Lock()
		defer a.mu.Unlock()
		items := []object{}
		for p, o := range a.objects {
			if name, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name="); ok && strings.HasSuffix(p, "/configmaps/"+name) {
				items = append(items, o)
			}
		}
		_ = json.NewEncoder(w).Encode(object{"metadata": object{}, "items": items})
	case r.Method == http.MethodGet && (path == nodesPath || path == csrPath):
		a.list(w, r, path)
	default:
		if r.Method == http.MethodPut && held != nil {
			a.waiting <- struct{}{}
			<-held
		}
		a.object(w, r, path)
	}
}

// list answers with two Nodes at most, as Kubernetes does with "limit".
func (a *apiServer) list(w http.ResponseWriter, r *http.Request, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	meta, items := object{"resourceVersion": fmt.Sprint(a.version)}, []object{}
	for _, p := range slices.Sorted(maps.Keys(a.objects)) {
		o := a.objects[p]
		spec, _ := o["spec"].(object)
		signer, _ := spec["signerName"].(string)
		if !strings.HasPrefix(p, path+"/") || p <= r.URL.Query().Get("continue") || signer != "" && r.URL.Query().Get("fieldSelector") != "spec.signerName="+signer {
			continue
		}
		if len(items) == 2 && path == nodesPath {
			meta["continue"] = path + "/" + items[1]["metadata"].(object)["name"].(string)
			break
		}
		items = append(items, o)
	}
	_ = json.NewEncoder(w).Encode(object{"metadata": meta, "items": items})
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	news := make(chan object, 64)
	if r.URL.Path == nodesPath {
		a.mu.Lock()
		a.watches[news] = struct{}{}
		if from := r.URL.Query().Get("resourceVersion"); from != "" { // what came between list and watch
			for _, o := range a.objects {
				if v := o["metadata"].(object)["resourceVersion"].(string); len(v) > len(from) || len(v) == len(from) && v > from {
					news <- object{"type": "MODIFIED", "object": copyOf(o)}
				}
			}
		}
		a.mu.Unlock()
		defer func() { a.mu.Lock(); delete(a.watches, news); a.mu.Unlock() }()
	}
	for {
		select {
		case <-r.Context().Done():
			return
		case e := <-news:
			if json.NewEncoder(w).Encode(e) != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
	}
}

func (a *apiServer) object(w http.ResponseWriter, r *http.Request, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.objects[path]
	fail := func(code int, text string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(object{"message": text})
	}
	var body object
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			fail(http.StatusBadRequest, err.Error())
			return
		}
	}
	switch {
	case o == nil && r.Method != http.MethodPatch:
		fail(http.StatusNotFound, path+" not found")
		return
	case r.Method == http.MethodPut && body["metadata"].(object)["resourceVersion"] != o["metadata"].(object)["resourceVersion"]:
		fail(http.StatusConflict, "the object has been modified")
		return
	case r.Method == http.MethodPut:
		a.set(path, body)
	case r.Method == http.MethodPatch && o != nil && r.Header.Get("Content-Type") == "application/strategic-merge-patch+json":
		meta, _ := body["metadata"].(object)
		if labels, ok := meta["labels"].(object); ok {
			o["metadata"].(object)["labels"] = labels
		}
		a.set(path, o)
	case r.Method == http.MethodPatch:
		a.set(path, body)
	case r.Method == http.MethodDelete:
		if body["preconditions"].(object)["uid"] != o["metadata"].(object)["uid"] {
			fail(http.StatusConflict, "another one")
			return
		}
		a.tell(path, "DELETED")
		delete(a.objects, path)
	}
	_ = json.NewEncoder(w).Encode(a.objects[path])
}
