package kubeletd

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// answers is an API server that says one thing when it is asked for a list, and another to who watches.
type answers struct {
	status      int
	list, watch []byte
	asked       int
}

func (a *answers) RoundTrip(r *http.Request) (*http.Response, error) {
	body := a.list
	if r.URL.Query().Has("watch") {
		body = a.watch
	}
	if a.asked++; a.asked > 8 { // a list whose pages never end
		body = nil
	}
	return &http.Response{StatusCode: a.status, Status: "a status", Body: io.NopCloser(bytes.NewReader(body)), Request: r}, nil
}

// FuzzNodes follows what an API server says of Nodes, which is what kubelets said.
func FuzzNodes(f *testing.F) {
	node := `{"metadata":{"name":"w1","uid":"u","resourceVersion":"7","labels":{"a":"b"}},"spec":{"podCIDR":"10.244.1.0/24"},"status":{"addresses":[{"type":"InternalIP","address":"10.5.0.101"}]}}`
	f.Add(uint16(200), []byte(`{"metadata":{"resourceVersion":"7"},"items":[`+node+`]}`), []byte(`{"type":"MODIFIED","object":`+node+`}{"type":"DELETED","object":`+node+`}`))
	f.Add(uint16(200), []byte(`{"metadata":{"continue":"x"},"items":null}`), []byte(`{"type":"ERROR","object":{"kind":"Status"}}`))
	f.Add(uint16(403), []byte(`{"message":"no\u001b[2J"}`), []byte("null"))
	testfuzz.Run(f, func(t *testing.T, code uint16, list, watch []byte) {
		c := &cluster{server: "https://10.0.0.1:6443", http: &http.Client{Transport: &answers{status: 200 + int(code)%400, list: list, watch: watch}}}
		err := c.followNodes(t.Context(), func(all map[string]Peer) {
			if len(all) > len(list)+len(watch) {
				t.Errorf("%d Nodes", len(all))
			}
			strangers(all, map[string]Member{"w1": {}})
		})
		if err != nil && (err.Error() == "" || errs.Is(err, errs.Exhausted)) {
			t.Error(err)
		}
	})
}
