package storaged

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// tables is device-mapper for one process; what is in it is open.
type tables struct {
	mu  sync.Mutex
	all map[string]dm.Crypt // guarded by mu
}

func (m *tables) Create(name, uuid string, t dm.Crypt) (dm.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t.Key = t.Key.Copy()
	m.all[name] = t
	return dm.Status{Name: name, UUID: uuid, Live: true}, nil
}

func (m *tables) Table(name string) (dm.Crypt, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.all[name]
	if !ok {
		return t, dm.ErrNone
	}
	t.Key = t.Key.Copy()
	return t, nil
}

// lock closes all.
func (m *tables) lock() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.all)
}

func (m *tables) Status(string) (dm.Status, error) { return dm.Status{}, dm.ErrNone }
func (m *tables) Reload(string, dm.Crypt) error    { return errors.New("not here") }
func (m *tables) Remove(string) error              { return errors.New("not here") }
func (m *tables) Close() error                     { return nil }

// cryptFake is a machine whose two volumes are encrypted, in files, and open or not as the vault has them.
type cryptFake struct {
	*fake
	tables *tables
}

func (f *cryptFake) Do(context.Context, Step) error { return nil }

func (f *cryptFake) Read(ctx context.Context) (State, error) {
	s, err := f.fake.Read(ctx)
	for i := range s.Disks[0].Partitions {
		p := &s.Disks[0].Partitions[i]
		if volumeOf(p.Partition) < 0 {
			continue
		}
		file, err := os.Open(p.Device)
		if err != nil {
			return s, err
		}
		if h := vault.Look(file); h != nil {
			p.LUKS = *h
		}
		file.Close()
		_, err2 := f.tables.Table(vault.MapName(p.Name))
		if p.Map = (Map{}); err2 == nil {
			p.Map = Map{Device: "/dev/dm-1", Dev: "dm:" + p.Name, Content: probe.Result{Kind: probe.Ext4, Label: volumes[volumeOf(p.Partition)].label}}
		}
	}
	return s, err
}

// serveCrypt makes both volumes and serves them to apid.
func serveCrypt(t *testing.T) (*grpc.ClientConn, *vault.Vault, *cryptFake) {
	t.Helper()
	dir, tab := t.TempDir(), &tables{all: map[string]dm.Crypt{}}
	v := vault.New(vault.Config{
		Mapper: func() (vault.Mapper, error) { return tab, nil }, TPM: func() (*tpm.TPM, error) { return nil, os.ErrNotExist },
		Boot: dir, Key: dir + "/none", Cmdline: "/proc/cmdline", Runtime: dir, Firmware: dir, Blocks: dir, Dev: dir,
	})
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	folder, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	for _, n := range []int{5, 6} {
		p := m.Disks[0].part(n)
		p.Device, p.Content = filepath.Join(dir, p.Name), probe.Result{Kind: probe.LUKS}
		p.KernelStart, p.KernelSize = p.Start(), luks.DataOffset+mib
		if err := errors.Join(os.WriteFile(p.Device, nil, 0o600), os.Truncate(p.Device, p.KernelSize)); err != nil {
			t.Fatal(err)
		}
		f := vault.Format{Target: vault.Target{Name: p.Name, Device: p.Device, Dev: "254:5", Size: p.KernelSize}}
		if n == 6 {
			f.Folder = folder
		}
		if err := v.Format(f); err != nil {
			t.Fatal(err)
		}
	}
	m.Mounts = nil
	k := &cryptFake{&fake{m: m}, tab}
	return serveKernel(t, k, v, dir, func(net.Conn) (uid.ID, error) { return uid.Apid, nil }), v, k
}

func TestKeys(t *testing.T) {
	conn, _, _ := serveCrypt(t)
	c := storagev1.NewKeysClient(conn)
	ctx := t.Context()
	list := func() (out string) {
		l, err := c.ListKeys(ctx, &storagev1.ListKeysRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range l.Keys {
			out += k.Id + " " + k.Kind + ", "
		}
		return strings.TrimSuffix(out, ", ")
	}
	if got, want := list(), "STATE-0 recovery, VAR-0 recovery, VAR-1 state"; got != want {
		t.Errorf("keys %s; want %s", got, want)
	}
	first, err := c.GetRecoveryKey(ctx, &storagev1.GetRecoveryKeyRequest{})
	if err != nil || len(first.RecoveryKey) != 39 {
		t.Fatalf("%v, %v", first, err)
	}
	for range 2 {
		if _, err := c.AcknowledgeRecoveryKey(ctx, &storagev1.AcknowledgeRecoveryKeyRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.GetRecoveryKey(ctx, &storagev1.GetRecoveryKeyRequest{}); !errs.Is(err, errs.NotFound) {
		t.Errorf("once more: %v", err)
	}
	for name, bad := range map[string]*storagev1.AddKeyRequest{
		"no kind": {}, "an unknown kind": {Kind: "yubikey"}, "a passphrase for the TPM": {Kind: "tpm", Passphrase: "correct horse"}, "a short passphrase": {Kind: "passphrase", Passphrase: "short"},
		"no passphrase": {Kind: "passphrase"}, "a file that is nowhere": {Kind: "keyFile"}, "a service without a pin": {Kind: "kms", Address: "10.0.0.9:4050"}, "an address for a recovery key": {Kind: "recovery", Address: "x:1"},
	} {
		if _, err := c.AddKey(ctx, bad); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.AddKey(ctx, &storagev1.AddKeyRequest{Kind: "tpm"}); !errs.Is(err, errs.Precondition) {
		t.Errorf("no TPM: %v", err)
	}
	added, err := c.AddKey(ctx, &storagev1.AddKeyRequest{Kind: "passphrase", Passphrase: "correct horse"})
	if err != nil || added.Key.Id != "STATE-1" || added.RecoveryKey != "" {
		t.Errorf("%v, %v", added, err)
	}
	rotated, err := c.RotateKey(ctx, &storagev1.RotateKeyRequest{Id: "STATE-0"})
	if err != nil || rotated.RecoveryKey == first.RecoveryKey || rotated.Key.Kind != "recovery" {
		t.Errorf("%v, %v", rotated, err)
	}
	if _, err := c.RotateKey(ctx, &storagev1.RotateKeyRequest{Id: "STATE-1"}); !errs.Is(err, errs.Invalid) {
		t.Errorf("a passphrase without the new one: %v", err)
	}
	if _, err := c.RotateKey(ctx, &storagev1.RotateKeyRequest{Id: "STATE-9"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("no such key: %v", err)
	}
	if _, err := c.RemoveKey(ctx, &storagev1.RemoveKeyRequest{Id: "nothing"}); !errs.Is(err, errs.Invalid) {
		t.Errorf("no id: %v", err)
	}
	if _, err := c.RemoveKey(ctx, &storagev1.RemoveKeyRequest{Id: "STATE-1"}); err != nil {
		t.Error(err)
	}
	if got, want := list(), "STATE-2 recovery, VAR-1 state, VAR-2 recovery"; got != want {
		t.Errorf("in the end %s; want %s", got, want)
	}
}

func TestUnlock(t *testing.T) {
	conn, v, k := serveCrypt(t)
	key, _ := v.RecoveryKey()
	c := storagev1.NewUnlockClient(conn)
	ctx := t.Context()
	binding := make([]byte, unlock.BindingSize)
	if _, err := c.Challenge(ctx, &storagev1.ChallengeRequest{ChannelBinding: binding}); !errs.Is(err, errs.Precondition) {
		t.Errorf("nothing is locked: %v", err)
	}
	k.tables.lock()
	if _, err := c.Challenge(ctx, &storagev1.ChallengeRequest{}); !errs.Is(err, errs.Invalid) {
		t.Errorf("not through apid: %v", err)
	}
	all, err := c.Challenge(ctx, &storagev1.ChallengeRequest{ChannelBinding: binding})
	if err != nil || len(all.Challenges) != 1 || len(all.Reasons) != 2 || !strings.Contains(all.Reasons[0], "STATE: it has only keys that people have") {
		t.Fatalf("%v, %v", all, err)
	}
	verifier := unlock.Verifier(unlock.Recovery, key.Expose(), nil)
	if !unlock.Equal(all.Challenges[0].Proof, unlock.NodeProof(verifier, binding)) {
		t.Error("the node does not know the key")
	}
	r := &storagev1.UnlockRequest{ChannelBinding: binding, Kind: unlock.Recovery, Key: string(unlock.NewRecoveryKey()), Proof: make([]byte, 32)}
	start := time.Now()
	if _, err := c.Unlock(ctx, r); !errs.Is(err, errs.Unauthenticated) || time.Since(start) < wrongDelay {
		t.Errorf("a wrong key: %v after %s", err, time.Since(start))
	}
	r.Key = "too short"
	if _, err := c.Unlock(ctx, r); !errs.Is(err, errs.Invalid) {
		t.Errorf("no key: %v", err)
	}
	r.Key, r.Proof = strings.ToLower(string(key.Expose())), unlock.CallerProof(verifier, binding)
	if got, err := c.Unlock(ctx, r); err != nil || len(got.Volumes) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := c.Unlock(ctx, r); !errs.Is(err, errs.Precondition) {
		t.Errorf("once more: %v", err)
	}
}

// The status shows what opens a volume, and why it is locked.
func TestCryptStatus(t *testing.T) {
	conn, _, k := serveCrypt(t)
	k.tables.lock()
	s, err := storagev1.NewStorageClient(conn).GetStatus(t.Context(), &storagev1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	v := s.Volumes[0]
	if v.Encryption != "luks2" || v.State != "locked" || !strings.Contains(v.Detail, "only keys that people have") || len(v.Keys) != 1 || v.Keys[0].Detail != "nobody has acknowledged it yet" {
		t.Errorf("%v", v)
	}
	if s.Tpm.Present || s.Tpm.Unusable == "" {
		t.Errorf("%v", s.Tpm)
	}
}
