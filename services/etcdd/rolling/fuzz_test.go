package rolling

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzRecord: the record of a rolling change, which any control plane may have written, an older or newer one too, is read or refused, and
// can be asked all that it is asked.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"id": "a", "kind": "restart", "by": "ann", "phase": "running", "nodes": [{"name": "cp1", "role": "controlplane", "step": "waiting"}]}`))
	f.Add([]byte(`{"nodes": [{}, {"step": 3}]}`))
	f.Add([]byte(``))
	testfuzz.Run(f, func(t *testing.T, value []byte) {
		r, err := decode(value)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error that says nothing")
			}
			return
		}
		if i := r.current(); i < -1 || i >= len(r.Nodes) || r.left() > len(r.Nodes) || (i == -1) != (r.left() == 0) || r.String() == "" {
			t.Errorf("%q: current %d, left %d of %d", value, i, r.left(), len(r.Nodes))
		}
		text, err := json.Marshal(r)
		if err != nil {
			return // a time that JSON has not
		}
		again, err := decode(text)
		if err != nil || !reflect.DeepEqual(r.clone(), again.clone()) {
			t.Errorf("%q is read as %+v, and that as %+v, %v", value, r, again, err)
		}
	})
}
