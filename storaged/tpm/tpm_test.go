package tpm

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// A machine is a TPM, and what the firmware and an image do to it at boot.
type machine struct {
	t    *testing.T
	soft *testtpm.TPM
	*TPM
	log []byte // the firmware's
}

func newMachine(t *testing.T) *machine {
	soft := testtpm.Start(t)
	return &machine{t: t, soft: soft, TPM: New(soft)}
}

// signer makes a key for images once: it takes a while.
var signer, otherSigner = newKey(), newKey()

func newKey() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}

// firmware is what is measured into PCR 7 before an image runs.
type firmware []string

var secure = firmware{"SecureBoot", "PK", "KEK", "db", "dbx"}

// boot starts an image: the firmware measures its variables into PCR 7, the stub the image's command line into PCR 11.
func (m *machine) boot(vars firmware, cmdline string, by *rsa.PrivateKey, epoch int) Image {
	m.t.Helper()
	m.log = newLog()
	for _, v := range vars {
		name, _, _ := strings.Cut(v, "=")
		data := variable(name, v)
		d := sha256.Sum256(data)
		m.extend(7, d)
		m.log = appendEvent(m.log, 7, evVariable, d, data)
	}
	sections := []pcrpolicy.Section{{Name: ".linux", Data: []byte("kernel")}, {Name: ".cmdline", Data: []byte(cmdline)}}
	for _, s := range sections {
		m.extend(11, sha256.Sum256(append([]byte(s.Name), 0)))
		m.extend(11, sha256.Sum256(s.Data))
	}
	pcr11, err := pcrpolicy.PredictPCR11(sections)
	if err != nil {
		m.t.Fatal(err)
	}
	data, err := pcrpolicy.Sign(by, pcrpolicy.Policy{PCR11: pcr11, Epoch: epoch})
	if err != nil {
		m.t.Fatal(err)
	}
	i := Image{Key: &by.PublicKey, Epoch: epoch}
	if i.Signature, err = pcrpolicy.ParseSignature(data); err != nil {
		m.t.Fatal(err)
	}
	return i
}

func (m *machine) extend(pcr int, d [32]byte) {
	m.t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
	}.Execute(m.soft)
	if err != nil {
		m.t.Fatal(err)
	}
}

// seal prepares the TPM and seals a key, as at format time.
func (m *machine) seal(key secret.Bytes) Sealed {
	m.t.Helper()
	if err := m.Prepare(); err != nil {
		m.t.Fatal(err)
	}
	events, err := Events(m.log, pcrpolicy.PCRSecureBoot)
	if err != nil {
		m.t.Fatal(err)
	}
	s, err := m.Seal(key, &signer.PublicKey, events)
	if err != nil {
		m.t.Fatal(err)
	}
	data, err := json.Marshal(s) // as it lies in a token
	if err != nil {
		m.t.Fatal(err)
	}
	var again Sealed
	if err := json.Unmarshal(data, &again); err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("a sealed key takes %d bytes of JSON", len(data))
	return again
}

func (m *machine) opens(what string, s Sealed, i Image, want secret.Bytes) {
	m.t.Helper()
	got, err := m.Unseal(s, i, m.log)
	if err != nil || !got.Equal(want) {
		m.t.Errorf("%s: %v", what, err)
	}
}

func (m *machine) refuses(what string, s Sealed, i Image, cause Cause, text string) {
	m.t.Helper()
	_, err := m.Unseal(s, i, m.log)
	var r *Refusal
	if !errors.As(err, &r) {
		m.t.Errorf("%s: got %v, want a refusal", what, err)
		return
	}
	if r.Cause != cause || !strings.Contains(r.Text, text) {
		m.t.Errorf("%s: got %s: %s\nwant %s: …%s…", what, r.Cause, r.Text, cause, text)
	}
	m.t.Logf("%s: %s (%v)", what, r.Text, r.err)
}

func TestSeal(t *testing.T) {
	m := newMachine(t)
	image := m.boot(secure, "bulkhead epoch=2", signer, 2)
	key := secret.New(32)
	s := m.seal(key)
	m.opens("at once", s, image, key)

	m.soft.Reboot()
	image = m.boot(secure, "bulkhead epoch=2", signer, 2)
	m.opens("after a restart", s, image, key)
	if err := m.Cap(); err != nil {
		t.Fatal(err)
	}
	m.refuses("capped", s, image, CauseImage, "capped already")

	m.soft.Reboot()
	m.opens("a newer image", s, m.boot(secure, "bulkhead epoch=3 new", signer, 3), key)

	m.soft.Reboot()
	added := m.boot(secure, "bulkhead epoch=2", signer, 2)
	m.extend(pcrpolicy.PCRAdded, sha256.Sum256([]byte("init=/bin/sh")))
	m.refuses("a word added from outside", s, added, CauseAdded, "added to the image's command line")

	m.soft.Reboot()
	good := m.boot(secure, "bulkhead epoch=2", signer, 2)
	m.soft.Reboot()
	m.boot(secure, "bulkhead epoch=2 init=/bin/sh", otherSigner, 2)
	m.refuses("another command line, the old signature", s, good, CauseImage, "command line was changed")

	m.soft.Reboot()
	m.refuses("another signer", s, m.boot(secure, "bulkhead epoch=2", otherSigner, 2), CauseKey, "another key")

	m.soft.Reboot()
	forged := m.boot(secure, "evil", otherSigner, 2)
	forged.Key = &signer.PublicKey
	forged.Signature.Fingerprint = pcrpolicy.Fingerprint(forged.Key)
	m.refuses("a forged signature", s, forged, CauseSignature, "wrong")

	m.soft.Reboot()
	m.refuses("no policy", s, func() Image { m.boot(secure, "x", signer, 2); return Image{} }(), CauseNoPolicy, "no signed PCR policy")
	m.soft.Reboot()
	lied := m.boot(secure, "bulkhead epoch=2", signer, 2)
	lied.Epoch = 9
	m.refuses("a lie about the epoch", s, lied, CauseImage, "epoch 9")
}

func TestSecureBoot(t *testing.T) {
	m := newMachine(t)
	m.boot(secure, "bulkhead", signer, 1)
	s := m.seal(secret.New(32))
	for what, c := range map[string]struct {
		vars firmware
		text string
	}{
		"revocations":     {firmware{"SecureBoot", "PK", "KEK", "db", "dbx=new"}, "dbx was changed"},
		"Secure Boot off": {firmware{"SecureBoot=0", "PK", "KEK", "db", "dbx"}, "SecureBoot was changed"},
		"no keys":         {firmware{"SecureBoot=0"}, "PK is missing"},
		"one more":        {append(append(firmware{}, secure...), "MokList"), "MokList is new"},
	} {
		m.soft.Reboot()
		m.refuses(what, s, m.boot(c.vars, "bulkhead", signer, 1), CauseSecureBoot, c.text)
	}
	m.soft.Reboot()
	image := m.boot(firmware{"other"}, "bulkhead", signer, 1)
	m.log = nil
	m.refuses("without a log", s, image, CauseSecureBoot, "log cannot be read: there is none")
	m.log = newLog()
	m.refuses("with a log that lies", s, image, CauseSecureBoot, "does not tell all")
}

func TestEpoch(t *testing.T) {
	m := newMachine(t)
	key := secret.New(32)
	image := m.boot(secure, "two", signer, 2)
	if _, err := m.Epoch(); !errors.Is(err, ErrNoIndex) {
		t.Errorf("a new TPM: %v", err)
	}
	s := m.seal(key)
	for _, epoch := range []int{2, 1, 2} { // raising to an older one changes nothing
		if err := m.RaiseEpoch(epoch); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Epoch(); got != 2 || err != nil {
		t.Errorf("epoch %d, %v", got, err)
	}
	if out := m.soft.Tool("tpm2_nvread", fmt.Sprintf("%#x", pcrpolicy.Index)); hex.EncodeToString([]byte(out)) != "0000000000000003" {
		t.Errorf("tpm2_nvread: %x", out)
	}
	m.opens("of this epoch", s, image, key)
	if err := m.RaiseEpoch(3); err != nil {
		t.Fatal(err)
	}
	m.refuses("of an older epoch", s, image, CauseEpoch, "epoch 2, and this machine has run one of epoch 3")
	m.soft.Reboot()
	m.refuses("after a restart", s, m.boot(secure, "two", signer, 2), CauseEpoch, "start a newer image")
	m.soft.Reboot()
	m.opens("of the new one", s, m.boot(secure, "three", signer, 3), key)
	for _, epoch := range []int{0, 64, -1} {
		if err := m.RaiseEpoch(epoch); err == nil {
			t.Errorf("epoch %d", epoch)
		}
	}
}

// Another TPM, a cleared one, and one whose index was made anew open nothing.
func TestOtherTPM(t *testing.T) {
	m := newMachine(t)
	m.boot(secure, "bulkhead", signer, 1)
	key := secret.New(32)
	s := m.seal(key)
	m.soft.Replace()
	image := m.boot(secure, "bulkhead", signer, 1)
	m.refuses("another TPM", s, image, CauseTPM, "has no storage root key")
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	m.refuses("another TPM in use", s, image, CauseTPM, "is another one")

	s = m.seal(key)
	m.soft.Tool("tpm2_nvundefine", "-C", "o", fmt.Sprintf("%#x", pcrpolicy.Index)) // nobody has taken ownership
	m.refuses("without the index", s, image, CauseIndex, "has no index")
	m.soft.Tool("tpm2_nvdefine", fmt.Sprintf("%#x", pcrpolicy.Index), "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|authread|authwrite|no_da|nt=bits")
	m.refuses("with an index of the attacker's", s, image, CauseIndex, "made by somebody else")

	m.soft.Tool("tpm2_clear", "-c", "p")
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	m.refuses("cleared", s, image, CauseTPM, "is another one")
}

func TestOwnership(t *testing.T) {
	m := newMachine(t)
	image := m.boot(secure, "bulkhead", signer, 1)
	key := secret.New(32)
	s := m.seal(key)
	if set, err := m.OwnerSet(); set || err != nil {
		t.Errorf("a new TPM has an owner: %v, %v", set, err)
	}
	auth := secret.New(32)
	if err := m.TakeOwnership(auth); err != nil {
		t.Fatal(err)
	}
	if set, err := m.OwnerSet(); !set || err != nil {
		t.Errorf("no owner afterwards: %v, %v", set, err)
	}
	m.opens("with an owner", s, image, key)
	// A second installation finds all that it needs, and asks for nothing.
	if err := m.Prepare(); err != nil {
		t.Errorf("prepared again: %v", err)
	}
	m.opens("sealed again", m.seal(key), image, key)
	owned := func() error {
		_, err := tpm2.NVUndefineSpace{AuthHandle: owner(), NVIndex: indexNamed()}.Execute(m.soft)
		return err
	}
	if err := owned(); !errors.Is(err, tpm2.TPMRCBadAuth) {
		t.Errorf("the index can be taken away: %v", err)
	}
	if err := m.GiveUpOwnership(secret.New(32)); err == nil || !strings.Contains(err.Error(), "belongs to another system") {
		t.Errorf("given up with another authorisation: %v", err)
	}
	if err := errors.Join(m.RaiseEpoch(1), m.GiveUpOwnership(auth)); err != nil {
		t.Fatal(err)
	}
	if set, err := m.OwnerSet(); set || err != nil {
		t.Errorf("an owner is left: %v, %v", set, err)
	}
	if n, err := m.Epoch(); n != 1 || err != nil {
		t.Errorf("epoch %d, %v: it was lowered", n, err)
	}
	auth = secret.New(32)
	if err := m.TakeOwnership(auth); err != nil {
		t.Errorf("the next owner: %v", err)
	}
	m.soft.Tool("tpm2_nvundefine", "-C", "o", "-P", "hex:"+hex.EncodeToString(auth.Expose()), fmt.Sprintf("%#x", pcrpolicy.Index))
	if err := m.Prepare(); err == nil || !strings.Contains(err.Error(), "belongs to another system") {
		t.Errorf("prepared without the owner: %v", err)
	}
}

// A power cut while the TPM is prepared leaves something from which it goes on.
func TestPrepareAgain(t *testing.T) {
	m := newMachine(t)
	m.soft.Tool("tpm2_nvdefine", fmt.Sprintf("%#x", pcrpolicy.Index), "-C", "o", "-s", "8", "-a", "authread|authwrite|no_da|nt=bits")
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	if n, err := m.Epoch(); n != 0 || err != nil {
		t.Errorf("epoch %d, %v", n, err)
	}
	if out := m.soft.Tool("tpm2_getcap", "handles-persistent"); !strings.Contains(out, "0x81000001") {
		t.Errorf("persistent: %s", out)
	}
	if out := m.soft.Tool("tpm2_getcap", "handles-transient") + m.soft.Tool("tpm2_getcap", "handles-loaded-session"); strings.Contains(out, "0x") {
		t.Errorf("left in the TPM: %s", out)
	}
}

func TestLeavesNothing(t *testing.T) {
	m := newMachine(t)
	image := m.boot(secure, "bulkhead", signer, 1)
	s := m.seal(secret.New(32))
	for range 5 { // a TPM has room for three objects and three sessions
		m.opens("once more", s, image, func() secret.Bytes { k, _ := m.Unseal(s, image, nil); return k }())
	}
	if err := m.Cap(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		m.refuses("capped", s, image, CauseImage, "")
	}
	if out := m.soft.Tool("tpm2_getcap", "handles-transient") + m.soft.Tool("tpm2_getcap", "handles-loaded-session"); strings.Contains(out, "0x") {
		t.Errorf("left in the TPM: %s", out)
	}
}

// restless extends PCR 10 while a policy is gone through, as the kernel does for each module that it loads.
type restless struct {
	*machine
	left int // how often
}

func (r *restless) Send(command []byte) ([]byte, error) {
	const policyPCR = 0x17f
	if be.Uint32(command[6:]) == policyPCR && r.left > 0 {
		r.left--
		answer, err := r.soft.Send(command)
		r.extend(10, sha256.Sum256([]byte("a module")))
		return answer, err
	}
	return r.soft.Send(command)
}

func (r *restless) Close() error { return nil }

func TestPCRsChangeMeanwhile(t *testing.T) {
	m := newMachine(t)
	image := m.boot(secure, "bulkhead", signer, 1)
	key := secret.New(32)
	s := m.seal(key)
	r := &restless{machine: m, left: 25}
	got, err := New(r).Unseal(s, image, m.log)
	if err != nil || !got.Equal(key) || r.left > 0 {
		t.Errorf("%v, %d left", err, r.left)
	}
	r.left = 1 << 30
	if _, err := New(r).Unseal(s, image, m.log); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Errorf("for ever: %v", err)
	}
}

// wiretap notes what goes over the bus.
type wiretap struct {
	*testtpm.TPM
	heard []byte
}

func (w *wiretap) Send(command []byte) ([]byte, error) {
	answer, err := w.TPM.Send(command)
	w.heard = append(append(w.heard, command...), answer...)
	return answer, err
}

// Who listens on the bus while the key is sealed, and while it comes back, does not hear it.
func TestBus(t *testing.T) {
	m := newMachine(t)
	bus := &wiretap{TPM: m.soft}
	m.TPM = New(bus)
	image := m.boot(secure, "bulkhead", signer, 1)
	key := secret.New(32)
	s := m.seal(key)
	m.opens("with a wiretap", s, image, key)
	if !bytes.Contains(bus.heard, s.Private) {
		t.Fatal("the sealed key was not heard either: the test listens at the wrong place")
	}
	for i := range key.Len() - 7 { // in no piece of it
		if bytes.Contains(bus.heard, key.Expose()[i:i+8]) {
			t.Fatalf("bytes %d to %d of the key went over the bus in the clear", i, i+7)
		}
	}
}

// What is spoilt on the disk is an error and no panic.
func TestSpoiltBlob(t *testing.T) {
	m := newMachine(t)
	image := m.boot(secure, "bulkhead", signer, 1)
	good := m.seal(secret.New(32))
	for name, spoil := range map[string]func(*Sealed){
		"empty": func(s *Sealed) { s.Public, s.Private = nil, nil }, "short": func(s *Sealed) { s.Public = s.Public[:20] },
		"long":    func(s *Sealed) { s.Private = make([]byte, 1<<20) },
		"flipped": func(s *Sealed) { s.Private = append([]byte{}, s.Private...); s.Private[40]++ },
		"policy":  func(s *Sealed) { s.Public = append([]byte{}, s.Public...); s.Public[20]++ },
	} {
		s := good
		spoil(&s)
		if k, err := m.Unseal(s, image, nil); err == nil {
			t.Errorf("%s: %d bytes", name, k.Len())
		}
	}
}
