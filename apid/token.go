package apid

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// maxTokens is how many tokens are remembered as good.
const maxTokens = 256

// tokens remembers good tokens, since checking a signature costs as much as the rest of a call. The zero value is empty.
// Tokens themselves are not kept, only their hashes.
type tokens struct {
	mu    sync.Mutex
	roots *leaf.Roots                    // guarded by mu; under which the entries are good
	good  map[[sha256.Size]byte]identity // guarded by mu
}

// who returns the identity in a token. The signature is checked once, the time always.
func (t *tokens) who(text string, roots *leaf.Roots, now time.Time) (identity, error) {
	if len(text) > maxToken {
		return identity{}, errStranger
	}
	key := sha256.Sum256([]byte(text))
	t.mu.Lock()
	if t.roots != roots || len(t.good) >= maxTokens {
		t.roots, t.good = roots, map[[sha256.Size]byte]identity{}
	}
	id, ok := t.good[key]
	t.mu.Unlock()
	if ok && now.Before(id.expires) {
		return id, nil
	}
	id, err := fromToken(text, roots.State.GetTokenKeys(), now)
	if err == nil {
		err = admit(id, roots.State)
	}
	if err != nil {
		return id, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.roots == roots {
		t.good[key] = id
	}
	return id, nil
}
