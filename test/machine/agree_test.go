package machine

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtool"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
)

// said is what a node's API says about itself.
type said struct {
	update  *updatev1.Status
	volumes []*storagev1.Volume
}

// says asks the node, once the TPM's epoch is that of the version which runs and was found good.
func (n *node) says(t *testing.T) (s said) {
	t.Helper()
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, 3*time.Minute, "the epoch is raised", func() error {
		s.update, err = updatev1.NewUpdateClient(conn).GetStatus(t.Context(), &updatev1.GetStatusRequest{})
		if err == nil && s.update.EpochFloor != s.update.Epoch {
			err = fmt.Errorf("the version has %d, the TPM %d", s.update.Epoch, s.update.EpochFloor)
		}
		return err
	})
	st, err := storagev1.NewStorageClient(conn).GetStatus(t.Context(), &storagev1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s.volumes = st.Volumes
	return s
}

// agree lets other people's programs judge a machine that is off, and compares with what its API said: sbverify and fsck.vfat the EFI partition,
// veritysetup each slot, cryptsetup the volumes, tpm2-tools the TPM.
func (s said) agree(t *testing.T, m qemu.Machine, certificate, recovery string) {
	disk := openDisk(t, m)
	esp := disk.part(t, "ESP")
	testtool.Run(t, testtool.Path(t, "fsck.vfat", "dosfstools"), "-n", esp)
	kernels := testtool.Run(t, testtool.Path(t, "mdir", "mtools"), "-b", "-i", esp, "::/EFI/Linux")
	for _, slot := range s.update.Slots {
		if slot.Status == "empty" {
			continue
		}
		testtool.Run(t, testtool.Path(t, "veritysetup", "cryptsetup-bin"), "verify", disk.part(t, "ROOT-"+slot.Name), disk.part(t, "VERITY-"+slot.Name), slot.RootHash)
		name := regexp.MustCompile(fmt.Sprintf(`(?m)^::/(EFI/Linux/bulkhead_%04d_%s(\+[0-9-]+)?\.efi)\s*$`, slot.Sequence, regexp.QuoteMeta(slot.Version))).FindStringSubmatch(kernels)
		if name == nil {
			t.Errorf("slot %s has %s, sequence %d; mdir lists\n%s", slot.Name, slot.Version, slot.Sequence, kernels)
			continue
		}
		kernel := filepath.Join(t.TempDir(), "kernel.efi")
		testtool.Run(t, testtool.Path(t, "mcopy", "mtools"), "-i", esp, "::/"+name[1], kernel)
		testtool.Run(t, testtool.Path(t, "sbverify", "sbsigntool"), "--cert", certificate, kernel)
	}
	cryptsetup := testtool.Path(t, "cryptsetup", "cryptsetup-bin")
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(recovery), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, v := range s.volumes {
		part := disk.part(t, v.Name)
		var meta struct {
			Keyslots map[string]any
			Segments map[string]struct {
				Encryption string
				Sector     int `json:"sector_size"`
			}
		}
		if err := json.Unmarshal([]byte(testtool.Run(t, cryptsetup, "luksDump", "--dump-json-metadata", part)), &meta); err != nil {
			t.Fatal(err)
		}
		if g := meta.Segments["0"]; v.Encryption != "luks2" || g.Encryption != "aes-xts-plain64" || g.Sector != 4096 {
			t.Errorf("%s is %q to the API, and %+v to cryptsetup", v.Name, v.Encryption, g)
		}
		if len(meta.Keyslots) != len(v.Keys) {
			t.Errorf("%s has %d keys for the API, %d for cryptsetup", v.Name, len(v.Keys), len(meta.Keyslots))
		}
		testtool.Run(t, cryptsetup, "open", "--test-passphrase", "--type", "luks2", "--key-file", key, part)
	}
	tpm := testtpm.Open(t, filepath.Join(m.Dir, qemu.TPMFolder))
	bits := tpm.Tool("tpm2_nvread", fmt.Sprintf("%#x", pcrpolicy.Index))
	if len(bits) != 8 || binary.BigEndian.Uint64([]byte(bits)) != 1<<s.update.EpochFloor-1 {
		t.Errorf("the TPM's epoch is %x, the API says %d", bits, s.update.EpochFloor)
	}
	if out := tpm.Tool("tpm2_getcap", "handles-persistent"); !strings.Contains(out, "0x81000001") {
		t.Errorf("the TPM keeps no storage key: %s", out)
	}
}

// A machineDisk is the disk of a machine that is off.
type machineDisk struct {
	file  *os.File
	table gpt.Table
}

func openDisk(t *testing.T, m qemu.Machine) machineDisk {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(m.Dir, "disk.raw"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	table, health, err := gpt.Read(f, fi.Size())
	if err != nil || !health.OK() {
		t.Fatalf("the disk's partition table: %v, %+v", err, health)
	}
	return machineDisk{f, table}
}

// partition returns where a partition is.
func (d machineDisk) partition(t *testing.T, name string) gpt.Partition {
	t.Helper()
	p, ok := d.table.ByName(name)
	if !ok {
		t.Fatalf("the disk has no partition %s", name)
	}
	return p
}

// part copies a partition, at most its first GiB, which the tools find enough, to a file of its own.
func (d machineDisk) part(t *testing.T, name string) string {
	t.Helper()
	p := d.partition(t, name)
	out, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	const piece = 1 << 20
	buf, zero := make([]byte, piece), make([]byte, piece)
	size := min(p.Size(), 1<<30)
	for at := int64(0); at < size; at += piece {
		n, err := d.file.ReadAt(buf[:min(piece, size-at)], p.Start()+at)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if string(buf[:n]) != string(zero[:n]) {
			if _, err := out.WriteAt(buf[:n], at); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := out.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return out.Name()
}
