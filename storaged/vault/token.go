package vault

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// The tokens' types on the disk. They are never changed.
var tokenTypes = map[string]Kind{
	"bulkhead-tpm2": TPM, "bulkhead-recovery": Recovery, "bulkhead-passphrase": Passphrase, "bulkhead-keyfile": KeyFile, "bulkhead-kms": Service, "bulkhead-state": State,
}

// What tokens hold, besides type and keyslots. All of it stands on the disk in the open.
type (
	// tokenPerson is of recovery keys and passphrases.
	tokenPerson struct {
		Salt     []byte `json:"salt,omitempty"`
		Verifier []byte `json:"verifier"`        // of package unlock
		Given    bool   `json:"given,omitempty"` // a recovery key that somebody has acknowledged
	}
	tokenFile struct {
		Partition string `json:"partition,omitempty"`
		Firmware  string `json:"firmware,omitempty"`
	}
	// tokenService has the node's own identity towards the server: who has the disk can show it. What it protects is a disk that cannot reach the server.
	tokenService struct {
		Address     string `json:"address"`
		Pin         string `json:"pin"`
		Certificate []byte `json:"certificate"`
		Key         []byte `json:"key"`
		Sealed      []byte `json:"sealed"` // as the server returned it
		Salt        []byte `json:"salt"`   // with what the server unseals it makes the key: the server's part alone opens nothing
	}
	tokenState struct {
		File string `json:"file"` // in storaged's folder on STATE
	}
)

func kindOf(t luks.Token) Kind {
	if k, ok := tokenTypes[t.Type]; ok {
		return k
	}
	return Other
}

// newToken makes a token of a kind.
func newToken(k Kind, value any) (luks.Token, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return luks.Token{}, err
	}
	t := luks.Token{}
	for typ, kind := range tokenTypes {
		if kind == k {
			t.Type = typ
		}
	}
	return t, json.Unmarshal(data, &t.Fields)
}

// value reads a token's fields.
func value[T any](t luks.Token) (out T, err error) {
	data, err := json.Marshal(t.Fields)
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		return out, fmt.Errorf("token %s: %w", t.Type, err)
	}
	return out, nil
}

// tokens returns those of a kind, in the order of their numbers.
func tokens(h *luks.Header, k Kind) (out []luks.Token) {
	for _, n := range slices.Sorted(maps.Keys(h.Tokens)) {
		if t := h.Tokens[n]; kindOf(t) == k && len(t.Keyslots) > 0 {
			out = append(out, t)
		}
	}
	return out
}

// detail is for people; what cannot be read says so.
func detail(t luks.Token) string {
	text, err := "", error(nil)
	switch kindOf(t) {
	case TPM:
		var s tpm.Sealed
		if s, err = value[tpm.Sealed](t); err == nil {
			text = fmt.Sprintf("PCR 7 %.12s…, PCR key %.12s…", s.PCR7, s.Key)
		}
	case Recovery:
		var p tokenPerson
		if p, err = value[tokenPerson](t); err == nil && !p.Given {
			text = "nobody has acknowledged it yet"
		}
	case KeyFile:
		var f tokenFile
		if f, err = value[tokenFile](t); err == nil {
			text = f.String()
		}
	case Service:
		var s tokenService
		if s, err = value[tokenService](t); err == nil {
			text = s.Address
		}
	case State:
		text = "a file on STATE"
	}
	if err != nil {
		return err.Error()
	}
	return text
}

func (f tokenFile) String() string {
	if f.Partition != "" {
		return "partition " + f.Partition
	}
	return "firmware " + f.Firmware
}
