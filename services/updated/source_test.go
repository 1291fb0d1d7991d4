package updated

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	containerregistry "github.com/google/go-containerregistry/pkg/registry"

	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// server serves HTTP until the test ends.
func serveHTTP(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(s.Close)
	return s
}

// content serves bytes, with ranges.
func content(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "bundle", time.Unix(1, 0), bytes.NewReader(b))
	}
}

// limited ends every answer after n bytes, by cutting the connection.
func limited(n int64, h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { h(&limitedWriter{ResponseWriter: w, left: n}, r) }
}

type limitedWriter struct {
	http.ResponseWriter
	left int64
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p[:min(int64(len(p)), w.left)])
	if w.left -= int64(n); w.left == 0 {
		w.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// plain serves bytes without ranges.
func plain(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		_, _ = w.Write(b)
	}
}

func TestURL(t *testing.T) {
	head, data := testImage(t, "0.2.0", 3<<20)
	flip := bytes.Clone(data)
	flip[head.Offsets()[1]+2_000_000] ^= 1
	unsigned := bytes.Clone(data)
	copy(unsigned[bundle.HeadSize(len(head.Raw))-512:], make([]byte, 64))
	var failures atomic.Int32
	for _, c := range []struct {
		what string
		h    http.HandlerFunc
		kind errs.Kind // with want as a part of the text, if not Internal
		want string    // of the error; of a note, if there must be one
	}{
		{"with ranges", content(data), 0, ""},
		{"without ranges", plain(data), 0, ""},
		{"drops every 256 KiB", limited(256<<10, content(data)), 0, "ended at byte"},
		{"drops every 4 KiB", limited(4<<10, content(data)), errs.Unavailable, ""},
		{"drops every 256 KiB, without ranges", limited(256<<10, plain(data)), errs.Unavailable, "given up after"},
		{"stalls", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				content(data)(w, r)
				return
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %s/%d", strings.TrimPrefix(r.Header.Get("Range"), "bytes="), len(data)))
			w.WriteHeader(http.StatusPartialContent)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, errs.Unavailable, "the source stalls: less than"},
		{"trickles", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				content(data)(w, r)
				return
			}
			var from int64
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-/%d", from, len(data)))
			w.WriteHeader(http.StatusPartialContent)
			for ; r.Context().Err() == nil; from++ {
				_, _ = w.Write(data[from : from+1])
				w.(http.Flusher).Flush()
				time.Sleep(50 * time.Millisecond)
			}
		}, errs.Unavailable, "the source stalls: less than"},
		{"says it is longer than it is", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				content(data)(w, r)
				return
			}
			w.Header().Set("Content-Range", "bytes "+strings.TrimPrefix(r.Header.Get("Range"), "bytes=")+"/99999999")
			w.Header().Set("Content-Length", "1000000")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write([]byte("x"))
		}, errs.Unavailable, "given up after"},
		{"says it is shorter than it is", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "5000")
			w.Header().Set("Accept-Ranges", "bytes")
			_, _ = w.Write(data[:5000])
		}, errs.Unavailable, ""},
		{"answers another range", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				r.Header.Set("Range", "bytes=0-")
			}
			content(data)(w, r)
		}, errs.Unavailable, "answers with range"},
		{"is cut off", content(data[:len(data)/2]), errs.Precondition, "it is cut off"},
		{"is cut off, without ranges", plain(data[:len(data)/2]), errs.Unavailable, "given up after"},
		{"is cut off in the manifest", content(data[:800]), errs.Unavailable, "the bundle is cut off"},
		{"another byte", content(flip), errs.Invalid, "changed after it was signed: chunk"},
		{"no signature", content(unsigned), errs.Invalid, "changed after it was signed"},
		{"no bundle", content([]byte(strings.Repeat("<html>", 1000))), errs.Invalid, "not an update bundle"},
		{"empty", content(nil), errs.Invalid, "not an update bundle"},
		{"not there", http.NotFound, errs.NotFound, "404 Not Found (\"404 page not found\")"},
		{"forbidden", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, errs.Precondition, "403 Forbidden"},
		{"fails at first", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" && failures.Add(1) < 3 {
				http.Error(w, "try later", http.StatusServiceUnavailable)
				return
			}
			content(data)(w, r)
		}, 0, "503 Service Unavailable"},
		{"fails always", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				http.Error(w, "never", http.StatusInternalServerError)
				return
			}
			content(data)(w, r)
		}, errs.Unavailable, "given up after 4 failures in a row, at byte 0 of 300000; the last"},
		{"leads into the clear", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/bundle", http.StatusFound)
		}, errs.Invalid, "want an https URL"},
		{"leads in circles", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, errs.Precondition, "redirects"},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			b.start()
			last, notes, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: serveHTTP(t, c.h).URL + "/bundle"}})
			if c.kind == 0 {
				if err != nil || last.GetStep() != "done" || last.GetVersion() != "0.2.0" {
					t.Fatalf("got %v, %v", last, err)
				}
				b.storage.set(func() {
					if b.storage.committed != "0.2.0" {
						t.Error("not committed")
					}
				})
				_ = notes // a note is shown for a moment; a fast test may miss it
				return
			}
			if !errs.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v (kind %d), want …%s… (kind %d)", err, errs.Of(err), c.want, c.kind)
			}
			b.storage.set(func() {
				if b.storage.committed != "" {
					t.Error("committed all the same")
				}
			})
			b.machine.mu.Lock()
			defer b.machine.mu.Unlock()
			if len(b.machine.events) != 1 || !strings.HasPrefix(b.machine.events[0], "upgrade from http://") {
				t.Errorf("events: %q", b.machine.events)
			}
		})
	}
}

// Only what storaged misses is asked for.
func TestOnlyWhatIsMissing(t *testing.T) {
	head, data := testImage(t, "0.2.0", 8<<20)
	var mu sync.Mutex
	var served int64
	s := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		c := &countingWriter{ResponseWriter: w}
		content(data)(c, r)
		mu.Lock()
		defer mu.Unlock()
		if r.Header.Get("Range") != "" {
			served += c.n
		}
	})
	b := newBench(t)
	b.storage.have = map[[2]int][]byte{}
	for i, f := range head.Manifest.Files {
		for j := range f.Chunks {
			if j%20 != 3 || i != 1 {
				b.storage.have[[2]int{i, j}] = []byte("there")
			}
		}
	}
	b.start()
	last, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: s.URL}})
	must(t, err)
	mu.Lock()
	defer mu.Unlock()
	if served == 0 || served > int64(last.GetFetchBytes())*3/2 || last.GetFetchBytes() > 8<<20/10 {
		t.Errorf("%d bytes were served, %d are new, of %d", served, last.GetFetchBytes(), last.GetImageBytes())
	}
}

type countingWriter struct {
	http.ResponseWriter
	n int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.n += int64(n)
	return n, err
}

func TestTLS(t *testing.T) {
	_, data := testImage(t, "0.2.0", 1<<20)
	s := httptest.NewUnstartedServer(content(data))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	b := newBench(t)
	b.start()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	request := func(url, ca string) error {
		_, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Url{Url: url}, Ca: ca})
		return err
	}
	if err := request(s.URL, ca); err != nil {
		t.Errorf("with its certificate: %v", err)
	}
	if err := request(s.URL, ""); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("with a stranger's certificate: %v", err)
	}
	for _, url := range []string{"http://example.org/bundle", "ftp://example.org/x", "/etc/passwd", "file:///etc/passwd", "https://", ""} {
		if err := request(url, ""); !errs.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", url, err)
		}
	}
	if err := request(s.URL, "nonsense"); !errs.Is(err, errs.Invalid) {
		t.Errorf("a certificate that is none: %v", err)
	}
	old := httptest.NewUnstartedServer(content(data))
	old.Config.ErrorLog = log.New(io.Discard, "", 0)
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS11}
	old.StartTLS()
	t.Cleanup(old.Close)
	if err := request(old.URL, ca); !errs.Is(err, errs.Unavailable) {
		t.Errorf("TLS 1.1: %v", err)
	}
}

// push puts a bundle into a registry as an artifact, with plain HTTP, and returns the manifest's digest.
func push(t *testing.T, client *http.Client, base, name, tag string, head bundle.Head, data []byte, edit func(layers []map[string]any) []map[string]any) string {
	t.Helper()
	do := func(method, url, kind string, body []byte) *http.Response {
		t.Helper()
		r, err := http.NewRequest(method, url, bytes.NewReader(body))
		must(t, err)
		r.Header.Set("Content-Type", kind)
		resp, err := client.Do(r)
		must(t, err)
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s %s", method, url, resp.Status, text)
		}
		return resp
	}
	blob := func(title string, b []byte) map[string]any {
		digest := "sha256:" + bundle.Sum(b).String()
		where := do("POST", base+"/v2/"+name+"/blobs/uploads/", "", nil).Header.Get("Location")
		if strings.HasPrefix(where, "/") {
			where = base + where
		}
		do("PUT", where+"?digest="+digest, "application/octet-stream", b)
		return map[string]any{"mediaType": "application/octet-stream", "digest": digest, "size": len(b), "annotations": map[string]string{titleKey: title}}
	}
	layers := []map[string]any{blob(bundle.ManifestName, head.Raw), blob(bundle.SignatureName, head.Signature)}
	for i, f := range head.Manifest.Files {
		at := head.Offsets()[i]
		layers = append(layers, blob(f.Name, data[at:at+f.Size]))
	}
	if edit != nil {
		layers = edit(layers)
	}
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeManifest, "config": blob("", []byte("{}")), "layers": layers})
	must(t, err)
	do("PUT", base+"/v2/"+name+"/manifests/"+tag, typeManifest, m)
	return "sha256:" + bundle.Sum(m).String()
}

func TestOCI(t *testing.T) {
	head, data := testImage(t, "0.2.0", 2<<20)
	s := serveHTTP(t, containerregistry.New(containerregistry.Logger(log.New(io.Discard, "", 0))).ServeHTTP)
	host := strings.TrimPrefix(s.URL, "http://")
	digest := push(t, s.Client(), s.URL, "bulkhead/os", "0.2.0", head, data, nil)
	push(t, s.Client(), s.URL, "bulkhead/os", "half", head, data, func(l []map[string]any) []map[string]any { return l[:3] })
	push(t, s.Client(), s.URL, "bulkhead/os", "unsigned", head, data, func(l []map[string]any) []map[string]any { return append(l[:1:1], l[2:]...) })
	index := func(tag string, manifests ...map[string]any) {
		b, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": manifests})
		must(t, err)
		r, err := http.NewRequest("PUT", s.URL+"/v2/bulkhead/os/manifests/"+tag, bytes.NewReader(b))
		must(t, err)
		r.Header.Set("Content-Type", typeIndex)
		resp, err := s.Client().Do(r)
		must(t, err)
		resp.Body.Close()
	}
	entry := func(arch string) map[string]any {
		return map[string]any{"mediaType": typeManifest, "digest": digest, "size": 1, "platform": map[string]string{"architecture": arch, "os": "linux"}}
	}
	index("index", entry("s390x"), entry(architecture))
	index("elsewhere", entry("s390x"))
	for ref, want := range map[string]string{
		host + "/bulkhead/os:0.2.0":                             "",
		"oci://" + host + "/bulkhead/os@" + digest:              "",
		host + "/bulkhead/os:index":                             "",
		host + "/bulkhead/os:elsewhere":                         "nothing for the architecture",
		host + "/bulkhead/os:half":                              "is no update: it has no layer root.squashfs",
		host + "/bulkhead/os:unsigned":                          "the bundle is not signed",
		host + "/bulkhead/os:none":                              "404",
		host + "/none:0.2.0":                                    "404",
		host + "/bulkhead/os@sha256:" + strings.Repeat("0", 64): "404",
		"nonsense": "is no reference",
	} {
		b := newBench(t)
		stop := b.start()
		_, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Oci{Oci: ref}})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want …%s…", ref, err, want)
		}
		stop()
	}
}

// A registry that answers with another artifact than the one asked for, though it is as well signed: the digest decides.
func TestOCISwapped(t *testing.T) {
	inner := containerregistry.New(containerregistry.Logger(log.New(io.Discard, "", 0)))
	back := serveHTTP(t, inner.ServeHTTP)
	digests, heads := map[string]string{}, map[string]bundle.Head{}
	for _, version := range []string{"0.2.0", "0.3.0"} {
		head, data := testImage(t, version, 2<<20)
		digests[version], heads[version] = push(t, back.Client(), back.URL, "os", version, head, data, nil), head
	}
	for _, c := range []struct{ name, asked, answered, want string }{
		{"nothing", "", "", ""},
		{"the manifest", "/manifests/" + digests["0.2.0"], "/manifests/" + digests["0.3.0"], "sent another manifest than " + digests["0.2.0"]},
		{"a layer", "/blobs/sha256:" + bundle.Sum(heads["0.2.0"].Raw).String(), "/blobs/sha256:" + bundle.Sum(heads["0.3.0"].Raw).String(), "sent another layer than sha256:" + bundle.Sum(heads["0.2.0"].Raw).String()},
	} {
		front := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
			if c.asked != "" && strings.HasSuffix(r.URL.Path, c.asked) {
				r.URL.Path = strings.TrimSuffix(r.URL.Path, c.asked) + c.answered
			}
			inner.ServeHTTP(w, r)
		})
		b := newBench(t)
		stop := b.start()
		_, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Oci{Oci: strings.TrimPrefix(front.URL, "http://") + "/os@" + digests["0.2.0"]}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s swapped: %v, want …%s…", c.name, err, c.want)
		}
		stop()
	}
}

// A registry that wants a token, hands blobs out elsewhere, forgets the token on the way, and drops the line.
func TestOCIWithToken(t *testing.T) {
	head, data := testImage(t, "0.2.0", 2<<20)
	inner := containerregistry.New(containerregistry.Logger(log.New(io.Discard, "", 0)))
	back := serveHTTP(t, inner.ServeHTTP)
	push(t, back.Client(), back.URL, "os", "v1", head, data, nil)
	elsewhere := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the token went to another server")
		}
		limited(300<<10, func(w http.ResponseWriter, r *http.Request) {
			rec := httptest.NewRecorder()
			q := r.Clone(r.Context())
			q.Header.Del("Range")
			inner.ServeHTTP(rec, q)
			content(rec.Body.Bytes())(w, r)
		})(w, r)
	})
	var valid atomic.Value
	valid.Store("")
	var tokens, requests atomic.Int32
	var front *httptest.Server
	front = serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			user, password, _ := r.BasicAuth()
			if user != "me" || password != "secret" || r.URL.Query().Get("scope") != "repository:os:pull" || r.URL.Query().Get("service") != "reg" {
				http.Error(w, "who are you?", http.StatusUnauthorized)
				return
			}
			valid.Store(fmt.Sprintf("token-%d", tokens.Add(1)))
			fmt.Fprintf(w, `{"token":%q}`, valid.Load())
			return
		}
		if requests.Add(1)%9 == 0 {
			valid.Store("another")
		}
		if r.Header.Get("Authorization") != "Bearer "+valid.Load().(string) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="reg",scope="repository:os:pull"`, front.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
			_, port, _ := net.SplitHostPort(strings.TrimPrefix(elsewhere.URL, "http://"))
			http.Redirect(w, r, "http://localhost:"+port+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		inner.ServeHTTP(w, r)
	})
	ref := strings.TrimPrefix(front.URL, "http://") + "/os:v1"
	b := newBench(t)
	b.start()
	if _, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Oci{Oci: ref}, Username: "me", Password: "secret"}); err != nil {
		t.Error(err)
	}
	if tokens.Load() < 2 {
		t.Errorf("%d tokens were asked for: it was not seen that one had expired", tokens.Load())
	}
	if _, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Oci{Oci: ref}, Username: "me", Password: "wrong"}); !errs.Is(err, errs.Precondition) || strings.Contains(err.Error(), "wrong") || !strings.Contains(err.Error(), "who are you?") {
		t.Errorf("a wrong password: %v", err)
	}
}

func TestMedium(t *testing.T) {
	_, data := testImage(t, "0.2.0", 3<<20)
	for device, want := range map[string]string{"/dev/sdb": "", "auto": "", "/dev/sdc": "/dev/sdc"} {
		b := newBench(t)
		b.storage.media = append(bytes.Clone(data), make([]byte, 100_000)...)
		stop := b.start()
		_, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Media{Media: device}})
		if want == "" && err != nil || want != "" && !errs.Is(err, errs.NotFound) {
			t.Errorf("%s: %v", device, err)
		}
		stop()
	}
	b := newBench(t)
	b.start()
	if _, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Media{Media: "auto"}}); !errs.Is(err, errs.NotFound) {
		t.Errorf("no medium: %v", err)
	}
	if _, _, err := b.upgrade(&updatev1.UpgradeRequest{Source: &updatev1.UpgradeRequest_Media{Media: strings.Repeat("x", 70000)}}); !errs.Is(err, errs.Invalid) || len(err.Error()) > 200 {
		t.Errorf("a long name: %.300v", err)
	}
}
