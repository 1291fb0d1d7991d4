package trustd

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// ears are the daemons of this node that follow what is trusted, and how far each has got. The zero value is none.
type ears struct {
	mu      sync.Mutex
	by      map[uid.ID]*ear // guarded by mu
	changed latest.Cell[uint64]
	count   uint64 // guarded by mu
	// before are those who listened to the run of trustd before this one, in this boot: they begin anew by and by, and until waitFor ends one that has not is not thought to be gone.
	before  map[uid.ID]bool // guarded by mu
	waitFor time.Time
	keep    func([]uid.ID) error // nil: nowhere
}

// listenersFile has the daemons that listened in this boot; runtime folder only. They outlive trustd, with what they were told.
const listenersFile = "listeners.json"

// comeBack is how long a daemon takes at most to listen again after trustd was restarted (internal/leaf: a quarter of a second, and what a busy machine adds).
const comeBack = 10 * time.Second

// load reads who listened before, from a folder that is lost with the power: after that every daemon begins with what is said now.
func (e *ears) load(dir string, now time.Time) error {
	e.keep = func(ids []uid.ID) error {
		data, err := json.Marshal(ids)
		if err != nil {
			return err
		}
		return writeFile(dir, listenersFile, data)
	}
	data, err := readFile(filepath.Join(dir, listenersFile))
	if err != nil {
		return ignoreMissing(err)
	}
	var ids []uid.ID
	if err := json.Unmarshal(data, &ids); err != nil {
		return err
	}
	e.before, e.waitFor = map[uid.ID]bool{}, now.Add(comeBack)
	for _, id := range ids {
		e.before[id] = true
	}
	return nil
}

type ear struct {
	streams int
	said    *trustv1.ReportTrustRequest // nil: nothing since it began to listen
}

// open notes that a daemon listens, until the function that is returned is called.
func (e *ears) open(who uid.ID) (done func(), err error) {
	e.change(func() {
		if !e.before[who] {
			if e.before == nil {
				e.before = map[uid.ID]bool{}
			}
			e.before[who] = true
			if e.keep != nil {
				err = e.keep(slices.Sorted(maps.Keys(e.before)))
			}
		}
		if e.by == nil {
			e.by = map[uid.ID]*ear{}
		}
		if e.by[who] == nil {
			e.by[who] = &ear{}
		}
		e.by[who].streams++
		e.by[who].said = nil
	})
	return func() {
		e.change(func() {
			if e.by[who].streams--; e.by[who].streams == 0 {
				delete(e.by, who) // it does not run, or begins anew
			}
		})
	}, err
}

// say notes how far a daemon has got.
func (e *ears) say(who uid.ID, r *trustv1.ReportTrustRequest) {
	e.change(func() {
		if b := e.by[who]; b != nil {
			b.said = r
		}
	})
}

func (e *ears) change(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
	e.count++
	e.changed.Set(e.count)
}

// pemSum is how a daemon names an authority: HeldCertificate.authority.
func pemSum(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// heard says which daemon does not act by t yet, or shows a certificate of an authority that signs no more; nil if all do.
func (e *ears) heard(t *trustv1.TrustState, now time.Time) error {
	signers := map[string]bool{}
	for _, bundle := range []string{t.GetOsCa(), t.GetEtcdCa(), t.GetKubernetesCa(), t.GetFrontProxyCa()} {
		if block, _ := pem.Decode([]byte(bundle)); block != nil {
			signers[pemSum(pemCert(block.Bytes))] = true
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	var late []string
	for who, b := range e.by {
		ok := b.said.GetAuthorities() == t.GetAuthorities()
		for _, h := range b.said.GetHeld() {
			ok = ok && signers[h.GetAuthority()]
		}
		if !ok {
			late = append(late, who.Name())
		}
	}
	for who := range e.before {
		if e.by[who] == nil && now.Before(e.waitFor) {
			late = append(late, who.Name())
		}
	}
	if len(late) == 0 {
		return nil
	}
	slices.Sort(late)
	return errs.New(errs.Unavailable, "daemons of this node that do not act by the authorities of now yet: %q", late)
}
