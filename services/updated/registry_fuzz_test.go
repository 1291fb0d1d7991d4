package updated

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// stranger is a registry that answers as the fuzzer says: who is asked for a token too.
type stranger struct {
	t         *testing.T
	status    int
	challenge string
	ranges    string
	manifest  []byte
	blob      []byte
	asked     int
}

func (s *stranger) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !isLoopback(r.URL.Hostname()) {
		s.t.Errorf("%s is asked in the clear", r.URL)
	}
	status, body := s.status, s.manifest
	if s.asked++; s.asked > 1 && status == http.StatusUnauthorized {
		status = http.StatusOK
	}
	if strings.Contains(r.URL.Path, "/blobs/") {
		body = s.blob
	}
	if s.asked > 20 {
		s.t.Fatalf("asked for ever, now for %s", r.URL)
	}
	return &http.Response{StatusCode: status, Status: "a status", Header: http.Header{"Www-Authenticate": {s.challenge}, "Content-Range": {s.ranges}, "Location": {s.challenge}},
		Body: io.NopCloser(bytes.NewReader(body)), Request: r}, nil
}

// FuzzRegistry pulls from whoever answers in the place of a registry.
func FuzzRegistry(f *testing.F) {
	layer := func(name string) string {
		return `{"mediaType":"m","digest":"sha256:` + strings.Repeat("0", 64) + `","size":7,"annotations":{"` + titleKey + `":"` + name + `"}}`
	}
	manifest := `{"layers":[` + strings.Join([]string{layer("manifest.json"), layer("manifest.sig"), layer("kernel.efi"), layer("root.squashfs"), layer("verity.img")}, ",") + `]}`
	f.Add(uint16(0), "", "bytes 0-99/200", []byte(manifest), []byte("{}"))
	f.Add(uint16(201), `Bearer realm="https://auth.example.org/token",service="s",scope="repository:a:pull"`, "bytes */0", []byte(`{"token":"t"}`), []byte(""))
	f.Add(uint16(201), `Bearer realm="http://auth.example.org/token"`, "", []byte(`{"manifests":[{"digest":"sha256:0","platform":{"architecture":"amd64"}}]}`), []byte(""))
	f.Add(uint16(201), `Basic realm="x"`, "bytes 9223372036854775807-1/x", []byte(`{"manifests":[`+layer("x")+`]}`), []byte(""))
	f.Add(uint16(0), "", "bytes 0-99/-1200", []byte("{}"), []byte("{}"))
	f.Add(uint16(107), "http://example.org/", "", []byte("null"), []byte("\x00"))
	testfuzz.Run(f, func(t *testing.T, status uint16, challenge, ranges string, manifest, blob []byte) {
		r, err := newRegistry("registry.example.org/bulkhead:1.2.3", "", "me", "secret", "amd64")
		if err != nil {
			t.Fatal(err)
		}
		r.client.Transport = &stranger{t: t, status: 200 + int(status)%400, challenge: challenge, ranges: ranges, manifest: manifest, blob: blob}
		if _, _, err = r.head(t.Context()); err == nil {
			_, _, _ = r.blobs, r.ranges, r.pieces(t.Context())
		} else if text := err.Error(); text == "" || len(text) > 4<<10 || strings.Contains(text, "secret") || errs.Of(err) == errs.Internal {
			t.Errorf("%d bytes: %.500q (%v)", len(text), text, errs.Of(err))
		}
		if from, total, ok := contentRange(ranges); ok && (from < 0 || total < -1) {
			t.Errorf("%q is %d of %d", ranges, from, total)
		}
	})
}
