package vault

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

func TestTPM(t *testing.T) {
	b := newBench(t, true)
	if m := b.Machine(); m != (Machine{TPM: true, ImageEpoch: 2}) {
		t.Errorf("before: %+v", m)
	}
	if n, kept, err := b.Epoch(); n != 0 || kept || err != nil {
		t.Errorf("before, epoch %d, %v, %v", n, kept, err)
	}
	b.must(b.RaiseEpoch(2)) // nothing keeps it
	b.format()
	if got, want := b.list(b.state)+" | "+b.list(b.vol), "0 recovery; 1 tpm | 0 recovery; 1 state"; got != want {
		t.Errorf("keys %s; want %s", got, want)
	}
	m := b.maps["bulkhead-STATE"]
	if m.uuid != "CRYPT-LUKS2-"+strings.ReplaceAll(b.look(b.state).UUID, "-", "")+"-bulkhead-STATE" || m.table.Offset != luks.DataOffset || m.table.Length != 8<<20 || m.table.SectorSize != 4096 {
		t.Errorf("the map is %+v", m)
	}
	b.must(b.TakeOwnership(b.folder))
	b.must(b.TakeOwnership(b.folder))

	b.boot("db")
	b.must(b.Open(t.Context(), b.state, nil))
	b.must(b.Cap())
	b.must(b.Cap()) // once is enough
	b.must(b.Open(t.Context(), b.vol, b.folder))
	if m := b.Machine(); m != (Machine{TPM: true, Capped: true, Owned: true, ImageEpoch: 2}) {
		t.Errorf("afterwards: %+v", m)
	}
	b.must(b.RaiseEpoch(2))
	if n, kept, err := b.Epoch(); n != 2 || !kept || err != nil || b.Machine().Epoch != 2 {
		t.Errorf("epoch %d, %v, %v", n, kept, err)
	}

	// Capped: nobody opens it this way any more, whoever asks, and a TPM that was reset does not count as capped.
	clear(b.maps)
	if err := b.Open(t.Context(), b.state, nil); err == nil || !strings.Contains(err.Error(), "asked once in this boot") {
		t.Errorf("opened once more: %v", err)
	}
	b.soft.Reboot()
	if b.Machine().Capped {
		t.Error("a TPM that was reset counts as capped")
	}
}

// After the firmware's keys changed, the node says so, opens with the recovery key, and can be sealed anew.
func TestSecureBootChanges(t *testing.T) {
	b := newBench(t, true)
	b.format()
	key, ok := b.RecoveryKey()
	if !ok {
		t.Fatal("no recovery key")
	}
	b.must(b.Acknowledge([]Target{b.state, b.vol}))
	if _, ok := b.RecoveryKey(); ok {
		t.Error("it is still there")
	}
	if d := b.look(b.state).Keys[0].Detail + b.look(b.vol).Keys[0].Detail; d != "" {
		t.Errorf("after the acknowledgement: %s", d)
	}
	b.boot("db and dbx")
	err := b.Open(t.Context(), b.state, nil)
	if err == nil || !strings.Contains(err.Error(), "Secure Boot is not as it was") || b.Why("STATE") == "" {
		t.Fatalf("got %v; why: %s", err, b.Why("STATE"))
	}
	b.must(b.Cap())
	b.restart()
	if err := b.Open(t.Context(), b.state, nil); err == nil || !strings.Contains(err.Error(), "Secure Boot is not as it was") {
		t.Errorf("a new process does not know why: %v", err)
	}
	opened, err := b.unlock(Recovery, strings.ToLower(string(key.Expose())))
	if err != nil || !slices.Equal(opened, []string{"STATE", "VAR"}) || !strings.Contains(b.Why("STATE"), "Secure Boot") {
		t.Fatalf("unlocked %v, %v, why %q", opened, err, b.Why("STATE"))
	}
	if _, _, err := b.Rotate(t.Context(), b.volumes(), "STATE", b.slot(TPM), secret.Bytes{}); err != nil {
		t.Fatal(err)
	}
	if why := b.Why("STATE"); why != "" || !b.Machine().Capped {
		t.Errorf("after it was sealed anew: %q, %+v", why, b.Machine())
	}
	b.boot("db and dbx")
	b.must(b.Open(t.Context(), b.state, nil))
	b.boot("db")
	if err := b.Open(t.Context(), b.state, nil); err == nil {
		t.Error("the old state of the firmware still opens it")
	}
}

func TestUnlock(t *testing.T) {
	b := newBench(t, false)
	if m := b.Machine(); m.TPM || !strings.Contains(m.Useless(), "no TPM") {
		t.Errorf("%+v", m)
	}
	b.format()
	key, _ := b.RecoveryKey()
	pass := secret.From([]byte("correct horse battery"))
	if _, _, err := b.Add(t.Context(), b.volumes(), Wish{Kind: Passphrase, Passphrase: pass}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Add(t.Context(), b.volumes(), Wish{Kind: Passphrase, Passphrase: secret.From([]byte("short"))}); !errs.Is(err, errs.Invalid) {
		t.Errorf("a short passphrase: %v", err)
	}
	b.boot("")
	if err := b.Open(t.Context(), b.state, nil); err == nil || !strings.Contains(err.Error(), "only keys that people have") {
		t.Errorf("got %v", err)
	}
	if _, err := b.unlock(Passphrase, "wrong horse battery"); !errors.Is(err, ErrProof) {
		t.Errorf("a wrong passphrase: %v", err)
	}
	if _, err := b.unlock(Recovery, string(unlock.NewRecoveryKey())); !errors.Is(err, ErrProof) {
		t.Errorf("a wrong recovery key: %v", err)
	}
	if opened, err := b.unlock(Passphrase, "correct horse battery"); err != nil || !slices.Equal(opened, []string{"STATE"}) {
		t.Errorf("by the passphrase: %v, %v", opened, err)
	}
	b.must(b.Open(t.Context(), b.vol, b.folder))
	b.must(b.Close("VAR"))
	b.must(b.Close("VAR"))

	// A proof is for one connection, and a proof for one key does not open with another.
	b.boot("")
	binding := make([]byte, unlock.BindingSize)
	proof := unlock.CallerProof(unlock.Verifier(unlock.Recovery, key.Expose(), nil), binding)
	if _, err := b.Unlock([]Target{b.state}, Recovery, key, append([]byte{1}, binding[1:]...), proof); !errors.Is(err, ErrProof) {
		t.Errorf("a proof of another connection: %v", err)
	}
	if _, err := b.Unlock([]Target{b.state}, Recovery, secret.From(unlock.NewRecoveryKey()), binding, proof); !errors.Is(err, luks.ErrKey) {
		t.Errorf("another key than the proof's: %v", err)
	}
	if opened, err := b.Unlock([]Target{b.state}, Recovery, key, binding, proof); err != nil || len(opened) != 1 {
		t.Errorf("the right one: %v, %v", opened, err)
	}
}

// VAR opens by its own STATE, and by no other.
func TestOtherState(t *testing.T) {
	b := newBench(t, false)
	b.format()
	clear(b.maps)
	if err := b.Open(t.Context(), b.vol, nil); err == nil || !strings.Contains(err.Error(), "STATE, which its key lies on, is not there") {
		t.Errorf("without STATE: %v", err)
	}
	b.must(b.folder.Rename(varKeyFile, "mine"))
	b.must(store(b.folder, varKeyFile, secret.New(secretSize).Expose()))
	if err := b.Open(t.Context(), b.vol, b.folder); err == nil || !strings.Contains(err.Error(), "does not open it") {
		t.Errorf("with another STATE: %v", err)
	}
	b.must(b.folder.Rename("mine", varKeyFile))
	b.must(b.Open(t.Context(), b.vol, b.folder))
	// A header of somebody else's, whose key he brings along.
	f, err := device(b.vol)
	b.must(err)
	defer f.Close()
	h, vk, err := luks.Format(f, luks.Options{})
	b.must(err)
	b.must(os.MkdirAll(filepath.Join(b.dir, "fw/opt/his"), 0o700))
	his := secret.New(32)
	b.write("fw/opt/his/raw", his.Expose())
	token, err := newToken(KeyFile, tokenFile{Firmware: "opt/his"})
	b.must(err)
	_, err = h.Update(f, vk, luks.Change{Add: his, KDF: luks.Random, Token: token})
	b.must(err)
	clear(b.maps)
	if err := b.Open(t.Context(), b.vol, b.folder); err == nil {
		t.Error("a VAR of somebody else's opens")
	}
	if info, err := b.folder.Stat(varKeyFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// The process restarts between the two formats: the recovery key that nobody has seen is replaced on the first volume.
func TestRecoveryKeyOfBoth(t *testing.T) {
	b := newBench(t, false)
	b.must(b.Format(Format{Target: b.state}))
	lost, _ := b.RecoveryKey()
	b.restart()
	if _, ok := b.RecoveryKey(); ok {
		t.Error("it is stored somewhere")
	}
	b.must(b.Format(Format{Target: b.vol, Folder: b.folder, Others: []Target{b.state}}))
	key, _ := b.RecoveryKey()
	clear(b.maps)
	if _, err := b.unlock(Recovery, string(lost.Expose())); !errors.Is(err, ErrProof) {
		t.Errorf("the lost key opens something: %v", err)
	}
	if opened, err := b.unlock(Recovery, string(key.Expose())); err != nil || len(opened) != 2 {
		t.Errorf("unlocked %v, %v", opened, err)
	}
	if d := b.look(b.state).Keys; len(d) != 1 || !strings.Contains(d[0].Detail, "nobody has acknowledged") {
		t.Errorf("%+v", d)
	}
	// Rotation makes the old one void, on both.
	_, text, err := b.Rotate(t.Context(), b.volumes(), "VAR", 0, secret.Bytes{})
	if err != nil || text == string(key.Expose()) {
		t.Fatalf("%q, %v", text, err)
	}
	clear(b.maps)
	if _, err := b.unlock(Recovery, string(key.Expose())); !errors.Is(err, ErrProof) {
		t.Errorf("the old key opens something: %v", err)
	}
	if opened, err := b.unlock(Recovery, text); err != nil || len(opened) != 2 {
		t.Errorf("unlocked %v, %v", opened, err)
	}
	if _, _, err := b.Add(t.Context(), b.volumes(), Wish{Kind: Recovery}); !errs.Is(err, errs.Conflict) {
		t.Errorf("a second recovery key: %v", err)
	}
}

func TestKeyFiles(t *testing.T) {
	b := newBench(t, false)
	b.format()
	add := func(w Wish) error { _, _, err := b.Add(t.Context(), b.volumes(), w); return err }
	for what, w := range map[string]Wish{"there is no partition KEY": {Kind: KeyFile, Partition: "KEY"}, "no file opt/x/none": {Kind: KeyFile, Firmware: "opt/x/none"}} {
		if err := add(w); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	b.write("blocks/sda1/uevent", []byte("MAJOR=8\nPARTNAME=KEY\nPARTN=1\n"))
	b.write("dev/sda1", make([]byte, partitionKey))
	if err := add(Wish{Kind: KeyFile, Partition: "KEY"}); err == nil || !strings.Contains(err.Error(), "zeros") {
		t.Errorf("zeros: %v", err)
	}
	key := secret.New(partitionKey).Expose()
	b.write("dev/sda1", append(slices.Clone(key), "something behind"...))
	b.must(add(Wish{Kind: KeyFile, Partition: "KEY"}))
	if err := add(Wish{Kind: KeyFile, Partition: "KEY"}); !errs.Is(err, errs.Conflict) {
		t.Errorf("twice: %v", err)
	}
	b.must(os.MkdirAll(filepath.Join(b.dir, "fw/opt/x/key"), 0o700))
	b.write("fw/opt/x/key/raw", key[:31])
	if err := add(Wish{Kind: KeyFile, Firmware: "opt/x/key"}); err == nil || !strings.Contains(err.Error(), "31 bytes") {
		t.Errorf("short: %v", err)
	}
	b.write("fw/opt/x/key/raw", key[:32])
	b.must(add(Wish{Kind: KeyFile, Firmware: "opt/x/key"}))

	clear(b.maps)
	b.must(b.Open(t.Context(), b.state, nil))
	clear(b.maps)
	b.write("blocks/sdb1/uevent", []byte("PARTNAME=KEY\n"))
	b.must(b.Open(t.Context(), b.state, nil)) // two partitions KEY: the other way is still there
	clear(b.maps)
	b.write("fw/opt/x/key/raw", key[1:33])
	if err := b.Open(t.Context(), b.state, nil); err == nil || !strings.Contains(err.Error(), "are all called KEY") || !strings.Contains(err.Error(), "does not open it") {
		t.Errorf("got %v", err)
	}
}

func TestKeyService(t *testing.T) {
	b := newBench(t, false)
	b.format()
	w := Wish{Kind: Service, Address: "10.0.0.9:4050", Pin: "sha256:00"}
	_, _, err := b.Add(t.Context(), b.volumes(), w)
	if err == nil || !strings.Contains(err.Error(), "sha256:") {
		t.Fatalf("a stranger: %v", err)
	}
	_, print, _ := strings.Cut(err.Error(), "sha256:")
	digest, err := hex.DecodeString(strings.TrimSuffix(print, ")"))
	if err != nil || len(digest) != 32 {
		t.Fatalf("fingerprint %q: %v", print, err)
	}
	b.relay.known[[32]byte(digest)] = true // as an administrator does, and it is the same at the second try
	k, _, err := b.Add(t.Context(), b.volumes(), w)
	if err != nil || k.Detail != w.Address || !w.Is(k) {
		t.Fatalf("%+v, %v", k, err)
	}
	clear(b.maps)
	b.must(b.Open(t.Context(), b.state, nil))
	// The server's part alone opens nothing.
	f, h, err := header(b.state)
	b.must(err)
	defer f.Close()
	if _, _, err := h.Open(f, secret.From(b.relay.kept[0]), k.Slot); !errors.Is(err, luks.ErrKey) {
		t.Errorf("the server's part: %v", err)
	}
	if _, _, err := b.Rotate(t.Context(), b.volumes(), "STATE", k.Slot, secret.Bytes{}); err != nil {
		t.Fatal(err)
	}
	clear(b.maps)
	b.relay.kept[0] = make([]byte, 32) // the old key is gone
	b.must(b.Open(t.Context(), b.state, nil))
	clear(b.maps)
	b.relay.down = true
	if err := b.Open(t.Context(), b.state, nil); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("down: %v", err)
	}
}

func TestRemove(t *testing.T) {
	b := newBench(t, true)
	b.format()
	if err := b.Remove(b.volumes(), "STATE", 9, false); !errs.Is(err, errs.NotFound) {
		t.Errorf("none: %v", err)
	}
	if err := b.Remove(b.volumes(), "STATE", b.slot(TPM), false); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "without a person") {
		t.Errorf("the last automatic one: %v", err)
	}
	if err := b.Remove(b.volumes(), "VAR", 1, true); !errs.Is(err, errs.Precondition) {
		t.Errorf("VAR's: %v", err)
	}
	b.must(b.Remove(b.volumes(), "STATE", b.slot(TPM), true))
	if err := b.Remove(b.volumes(), "STATE", b.slot(Recovery), true); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "last key") {
		t.Errorf("the last: %v", err)
	}
	if _, _, err := b.Add(t.Context(), b.volumes(), Wish{Kind: TPM}); err != nil {
		t.Error(err)
	}
	b.must(b.Remove(b.volumes(), "STATE", b.slot(Recovery), false))
	if got := b.list(b.vol); got != "1 state" {
		t.Errorf("VAR has %s", got)
	}
	k, text, err := b.Add(t.Context(), b.volumes(), Wish{Kind: Recovery})
	if err != nil || k.Kind != Recovery || len(text) != 39 {
		t.Errorf("%+v %q %v", k, text, err)
	}
	b.boot("db")
	b.must(b.Open(t.Context(), b.state, nil))
	if _, _, err := b.Add(t.Context(), Volumes{}, Wish{Kind: TPM}); !errs.Is(err, errs.Precondition) {
		t.Errorf("while STATE is locked: %v", err)
	}
}

func TestImage(t *testing.T) {
	b := newBench(t, true)
	for name, spoil := range map[string]func(){
		"no signed PCR policy": func() { b.must(os.Remove(filepath.Join(b.dir, "boot", signatureFile))) },
		"no bulkhead.epoch":    func() { b.write("cmdline", []byte("bulkhead")) },
		"one epoch from 1":     func() { b.write("cmdline", []byte("bulkhead.epoch=2 bulkhead.epoch=3")) },
		"another key": func() {
			k, _ := rsa.GenerateKey(rand.Reader, 2048)
			p, _ := pcrpolicy.EncodeKey(&k.PublicKey)
			b.write("pcr.pub", p)
		},
		"PCR signature": func() { b.write("boot/"+signatureFile, []byte("{}")) },
		"PCR key":       func() { b.write("boot/"+keyFile, []byte("x")) },
		"it is of another key": func() {
			k, _ := rsa.GenerateKey(rand.Reader, 2048)
			p, _ := pcrpolicy.EncodeKey(&k.PublicKey)
			b.write("boot/"+keyFile, p)
			b.write("pcr.pub", p)
		},
		"more than 8192 bytes": func() { b.write("boot/"+signatureFile, make([]byte, 10<<10)) },
		"no TPM":               func() { b.soft = nil },
	} {
		soft := b.soft
		b.boot("db")
		spoil()
		b.restart()
		if m := b.Machine(); !strings.Contains(m.Useless(), name) {
			t.Errorf("%s: %+v", name, m)
		}
		b.soft = soft
	}
}

func TestRepair(t *testing.T) {
	b := newBench(t, false)
	b.format()
	f, err := device(b.state)
	b.must(err)
	defer f.Close()
	_, err = f.WriteAt(make([]byte, 4096), 0)
	b.must(err)
	if h := b.look(b.state); h == nil || !strings.HasPrefix(h.Repair, "first copy: ") {
		t.Fatalf("%+v", h)
	}
	b.must(b.Repair(b.state))
	if h := b.look(b.state); h.Repair != "" || len(h.Keys) != 1 {
		t.Errorf("%+v", h)
	}
	b.vol.Size += 4 << 20
	b.must(b.Resize(b.vol))
	if got := b.maps["bulkhead-VAR"].table.Length; got != 12<<20 {
		t.Errorf("after the partition grew the map has %d bytes", got)
	}
	if _, err := f.WriteAt(make([]byte, 128<<10), 0); err != nil {
		t.Fatal(err)
	}
	if h := b.look(b.state); h != nil {
		t.Errorf("both copies gone: %+v", h)
	}
}

func TestID(t *testing.T) {
	if v, n, err := ParseID(ID("STATE", 12)); v != "STATE" || n != 12 || err != nil {
		t.Errorf("%s %d %v", v, n, err)
	}
	for _, bad := range []string{"", "STATE", "STATE-", "STATE-01", "STATE-32", "STATE--1", "STATE-x", "-11", "é-1", "BOOT-1", strings.Repeat("x", 70000)} {
		if _, _, err := ParseID(bad); err == nil || len(err.Error()) > 200 {
			t.Errorf("%.100q: %.300v", bad, err)
		}
	}
}

// What is given back can be taken by the next system, which finds the epoch as it was.
func TestGiveUpOwnership(t *testing.T) {
	b := newBench(t, true)
	b.format()
	if given, err := b.GiveUpOwnership(b.folder); given || err != nil {
		t.Errorf("nobody has taken it: %v, %v", given, err)
	}
	b.must(b.TakeOwnership(b.folder))
	b.must(b.RaiseEpoch(2))
	if given, err := b.GiveUpOwnership(b.folder); !given || err != nil || b.Machine().Owned {
		t.Errorf("given back: %v, %v, owned %v", given, err, b.Machine().Owned)
	}
	b.must(b.TakeOwnership(b.folder)) // the power failed before more was done: the same is set again
	b.must(b.folder.Remove(ownerFile))
	if given, err := b.GiveUpOwnership(b.folder); given || err != nil || !b.Machine().Owned {
		t.Errorf("somebody else's: %v, %v", given, err)
	}
	if n, kept, err := b.Epoch(); n != 2 || !kept || err != nil {
		t.Errorf("epoch %d, %v, %v", n, kept, err)
	}
}
