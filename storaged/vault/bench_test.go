package vault

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

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
