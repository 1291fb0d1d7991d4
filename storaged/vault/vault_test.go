package vault

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// mapper is device-mapper, as far as it is used here.
type mapper map[string]struct {
	uuid  string
	table dm.Crypt
}

func (m mapper) Create(name, uuid string, t dm.Crypt) (dm.Status, error) {
	if _, ok := m[name]; ok {
		return dm.Status{}, errors.New("busy")
	}
	t.Key = t.Key.Copy()
	m[name] = struct {
		uuid  string
		table dm.Crypt
	}{uuid, t}
	return m.Status(name)
}

func (m mapper) Reload(name string, t dm.Crypt) error {
	d := m[name]
	t.Key = t.Key.Copy()
	d.table = t
	m[name] = d
	return nil
}

func (m mapper) Remove(name string) error {
	if _, ok := m[name]; !ok {
		return dm.ErrNone
	}
	delete(m, name)
	return nil
}

func (m mapper) Status(name string) (dm.Status, error) {
	d, ok := m[name]
	if !ok {
		return dm.Status{}, dm.ErrNone
	}
	return dm.Status{Name: name, UUID: d.uuid, Live: true}, nil
}

func (m mapper) Table(name string) (dm.Crypt, error) {
	d, ok := m[name]
	if !ok {
		return dm.Crypt{}, dm.ErrNone
	}
	d.table.Key = d.table.Key.Copy()
	return d.table, nil
}

func (mapper) Close() error { return nil }

// relay is a key service that knows some nodes. It "encrypts" by remembering.
type relay struct {
	known map[[32]byte]bool
	kept  [][]byte
	down  bool
}

func (r *relay) may(p Place) error {
	if r.down {
		return errors.New("connection refused")
	}
	if !r.known[sha256.Sum256(p.Certificate)] {
		return errors.New("it does not know this node")
	}
	return nil
}

func (r *relay) Seal(_ context.Context, p Place, key secret.Bytes) ([]byte, error) {
	if err := r.may(p); err != nil {
		return nil, err
	}
	r.kept = append(r.kept, key.Copy().Expose())
	return []byte{byte(len(r.kept) - 1)}, nil
}

func (r *relay) Unseal(_ context.Context, p Place, sealed []byte) (secret.Bytes, error) {
	if err := r.may(p); err != nil {
		return secret.Bytes{}, err
	}
	return secret.From(slices.Clone(r.kept[sealed[0]])), nil
}

// bench is a machine with two partitions in files, and a TPM if wanted.
type bench struct {
	*Vault
	t          *testing.T
	dir        string
	soft       *testtpm.TPM
	maps       mapper
	relay      *relay
	state, vol Target
	folder     *os.Root // storaged's on STATE
}

var signer = func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
}()

func newBench(t *testing.T, withTPM bool) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), maps: mapper{}, relay: &relay{known: map[[32]byte]bool{}}}
	if withTPM {
		b.soft = testtpm.Start(t)
	}
	for _, d := range []string{"boot", "run", "fw/opt/x", "blocks/sda1", "blocks/sdb1", "dev", "state"} {
		if err := os.MkdirAll(filepath.Join(b.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	b.state, b.vol = b.partition("STATE"), b.partition("VAR")
	var err error
	if b.folder, err = os.OpenRoot(filepath.Join(b.dir, "state")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.folder.Close() })
	b.boot("db")
	return b
}

func (b *bench) partition(name string) Target {
	path := b.write("dev/"+name, nil)
	const size = luks.DataOffset + 8<<20
	if err := os.Truncate(path, size); err != nil {
		b.t.Fatal(err)
	}
	return Target{Name: name, Device: path, Dev: "254:5", Size: size}
}

func (b *bench) write(name string, data []byte) string {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// restart is a new process on a machine that runs on.
func (b *bench) restart() {
	at := func(name string) string { return filepath.Join(b.dir, name) }
	b.Vault = New(Config{
		Mapper: func() (Mapper, error) { return b.maps, nil },
		TPM: func() (*tpm.TPM, error) {
			if b.soft == nil {
				return nil, fs.ErrNotExist
			}
			return tpm.New(b.soft), nil
		},
		Boot: at("boot"), Key: at("pcr.pub"), Cmdline: at("cmdline"), Log: at("log"), Runtime: at("run"), Firmware: at("fw"), Blocks: at("blocks"), Dev: at("dev"), Relay: b.relay,
	})
}

// boot restarts the machine with a signed image; db is what the firmware measures into PCR 7.
func (b *bench) boot(db string) {
	b.t.Helper()
	clear(b.maps)
	os.RemoveAll(filepath.Join(b.dir, "run"))
	if err := os.Mkdir(filepath.Join(b.dir, "run"), 0o700); err != nil {
		b.t.Fatal(err)
	}
	b.write("cmdline", []byte("bulkhead bulkhead.epoch=2 quiet\n"))
	if b.soft != nil {
		b.soft.Reboot()
		pcr := pcrpolicy.Digest{}
		for i, what := range []string{".cmdline\x00", "x", db} {
			d := sha256.Sum256([]byte(what))
			n := 11
			if i == 2 {
				n = 7
			} else {
				pcr = pcrpolicy.Extend(pcr, d)
			}
			if _, err := (tpm2.PCRExtend{
				PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(n), Auth: tpm2.PasswordAuth(nil)},
				Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
			}).Execute(b.soft); err != nil {
				b.t.Fatal(err)
			}
		}
		sig, err := pcrpolicy.Sign(signer, pcrpolicy.Policy{PCR11: pcr, Epoch: 2})
		if err != nil {
			b.t.Fatal(err)
		}
		key, err := pcrpolicy.EncodeKey(&signer.PublicKey)
		if err != nil {
			b.t.Fatal(err)
		}
		b.write("boot/"+signatureFile, sig)
		b.write("boot/"+keyFile, key)
		b.write("pcr.pub", key)
	}
	b.restart()
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// format makes both volumes as storaged does.
func (b *bench) format() {
	b.t.Helper()
	b.must(b.Format(Format{Target: b.state, TPM: b.soft != nil}))
	b.must(b.Format(Format{Target: b.vol, Folder: b.folder, Others: []Target{b.state}}))
}

func (b *bench) volumes() Volumes { return Volumes{&b.state, &b.vol, b.folder} }

func (b *bench) look(t Target) *Header {
	b.t.Helper()
	f, err := os.Open(t.Device)
	b.must(err)
	defer f.Close()
	return Look(f)
}

// list is the keys of a volume in words.
func (b *bench) list(t Target) (out string) {
	for _, k := range b.look(t).Keys {
		out += fmt.Sprintf("%d %s; ", k.Slot, k.Kind)
	}
	return strings.TrimSuffix(out, "; ")
}

func (b *bench) slot(k Kind) int {
	b.t.Helper()
	for _, x := range b.look(b.state).Keys {
		if x.Kind == k {
			return x.Slot
		}
	}
	b.t.Fatalf("no key of kind %s in %s", k, b.list(b.state))
	return 0
}

// unlock does what bhctl does, over one connection.
func (b *bench) unlock(kind Kind, text string) ([]string, error) {
	b.t.Helper()
	key, err := unlock.Normalize(string(kind), text)
	b.must(err)
	binding := secret.New(unlock.BindingSize).Expose()
	locked := []Target{}
	for _, t := range []Target{b.state, b.vol} {
		if _, err := b.maps.Status(MapName(t.Name)); err != nil {
			locked = append(locked, t)
		}
	}
	all, err := b.Challenges(locked, binding)
	b.must(err)
	for _, c := range all {
		verifier := unlock.Verifier(string(kind), key, c.Salt)
		if c.Kind == kind && unlock.Equal(c.Proof, unlock.NodeProof(verifier, binding)) {
			return b.Unlock(locked, kind, secret.From(key), binding, unlock.CallerProof(verifier, binding))
		}
	}
	return b.Unlock(locked, kind, secret.From(key), binding, unlock.CallerProof(unlock.Verifier(string(kind), key, nil), binding))
}

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
	for _, bad := range []string{"", "STATE", "STATE-", "STATE-01", "STATE-32", "STATE--1", "STATE-x"} {
		if _, _, err := ParseID(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}
