package roster

import (
	"testing"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzParse: what stands in etcd, by whichever version wrote it: one entry that makes no sense does not spoil the others, and a
// revocation is never lost.
func FuzzParse(f *testing.F) {
	f.Add(nodes+"cp1", []byte(`{"role": "controlplane", "addresses": ["10.0.0.1"], "key": "k"}`))
	f.Add(tokens+"t", []byte(`{"expires": "2026-01-01T00:00:00Z"}`))
	f.Add(removed+"d", []byte(`{"at": 1}`))
	f.Add(revoked+"x", []byte("\xff"))
	testfuzz.Run(f, func(t *testing.T, key string, value []byte) {
		s := parse(map[string]*storev1.Entry{
			key: {Value: value, Revision: 3}, nodes + "w1": {Value: []byte(`{"role": "worker", "addresses": ["10.0.0.2"], "key": "w"}`)}, revoked + "bad": {}, removed + "gone": {Value: value},
		})
		if key != nodes+"w1" && s.Nodes["w1"].Role != "worker" || len(s.Revoked) == 0 {
			t.Errorf("%q with %q spoils the others: %+v", key, value, s)
		}
		if _, ok := s.Removed["gone"]; !ok {
			t.Errorf("%q: a removal is lost", value)
		}
		for _, n := range s.Cluster() {
			if n.GetName() == "" && key != nodes {
				t.Errorf("%q with %q: a node without a name", key, value)
			}
		}
	})
}
