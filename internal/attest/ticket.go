package attest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Ticket is what a cluster must remember between a challenge and its proof. The machine keeps it, and cannot read it: no control plane keeps anything for strangers, and any of
// them can go on.
type Ticket struct {
	Record  string    `json:"record"` // id of what allows it
	Name    string    `json:"name"`
	EK      []byte    `json:"ek"`
	AK      []byte    `json:"ak"`
	Nonce   []byte    `json:"nonce"`
	Secret  []byte    `json:"secret"`
	Expires time.Time `json:"expires"`
}

// maxTicket is in bytes.
const maxTicket = 8 << 10

var errTicket = errors.New("the ticket is none of this cluster's")

func tickets(key []byte) (cipher.AEAD, error) {
	m := hmac.New(sha256.New, key)
	m.Write([]byte("attest ticket"))
	b, err := aes.NewCipher(m.Sum(nil))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Seal encrypts a ticket. key is the cluster's key for join tokens, from which tickets have their own.
func (t Ticket) Seal(key []byte, random io.Reader) ([]byte, error) {
	gcm, err := tickets(key)
	if err != nil {
		return nil, err
	}
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := io.ReadFull(random, nonce); err != nil {
		return nil, err
	}
	return gcm.Seal(nonce, nonce, plain, nil), nil
}

// OpenTicket decrypts what Seal made, and says whether it is still good.
func OpenTicket(key, sealed []byte, now time.Time) (t Ticket, err error) {
	gcm, err := tickets(key)
	if err != nil {
		return t, err
	}
	n := gcm.NonceSize()
	if len(sealed) < n || len(sealed) > maxTicket {
		return t, errTicket
	}
	plain, err := gcm.Open(nil, sealed[:n], sealed[n:], nil)
	if err != nil {
		return t, errTicket
	}
	if err := json.Unmarshal(plain, &t); err != nil {
		return t, errTicket
	}
	if now.After(t.Expires) {
		return t, fmt.Errorf("the challenge was good until %s, and it is %s: ask for another one", t.Expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return t, nil
}
