package image

import (
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/deploy/image/uki"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// Where Debian's package systemd-boot-efi has what a firmware starts.
const (
	stubFile   = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	loaderFile = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
)

// A bootSet is what a firmware starts, but for the root hash: that is known only when the root is packed.
type bootSet struct {
	version      string
	epoch        int
	words        string // added to the command line
	keys         Keys
	stub, loader []byte // the loader is signed
	vmlinuz      []byte
	release      string // of the kernel
	initramfs    []byte // packed
}

// newBootSet signs the boot loader and packs the initramfs.
func newBootSet(cfg Config, files debian.Files, k kernel, initramfs []byte) (b bootSet, err error) {
	b = bootSet{version: cfg.Version, epoch: cfg.Epoch, words: cfg.Append, keys: cfg.Keys, vmlinuz: k.vmlinuz, release: k.release}
	for name, to := range map[string]*[]byte{stubFile: &b.stub, loaderFile: &b.loader} {
		_, f, ok := files.Lookup(name)
		if !ok {
			return b, fmt.Errorf("%s is in no package of the lock", name)
		}
		*to = f.Data
	}
	if b.loader, err = uki.Sign(b.loader, cfg.Keys.Boot, epoch); err != nil {
		return b, fmt.Errorf("systemd-boot: %w", err)
	}
	b.initramfs, err = packInitramfs(initramfs)
	return b, err
}

// packInitramfs packs it with zstd: two megabytes less in the EFI partition and in every update. The boot takes the same time, since a
// firmware reads slowly.
func packInitramfs(cpio []byte) ([]byte, error) {
	// One thread, so that the bytes do not depend on the machine.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(cpio, nil), nil
}

// cmdline is the kernel command line that belongs to the image, with more words at its end, if any; machines that boot the kernel directly may add to it.
func cmdline(rootHash string, epoch int, more string) string {
	return strings.TrimSpace(fmt.Sprintf("bulkhead bulkhead.verity=%s bulkhead.epoch=%d console=ttyS0 panic=10 quiet loglevel=4 %s %s", rootHash, epoch, protection(), more))
}

// bootRelease is what systemd-boot reads of a kernel image. It has no version, unlike the root's os-release: systemd-boot would order by
// it, and an older image that is installed on purpose would never start. So the file's name decides.
func bootRelease(version string) string {
	return fmt.Sprintf("ID=bulkhead\nNAME=\"Bulkhead\"\nPRETTY_NAME=\"Bulkhead %s\"\n", version)
}

// A signedKernel is a kernel image that a firmware trusts.
type signedKernel struct {
	image []byte
	pcr11 pcrpolicy.Digest // when systemd's stub has started it
}

// kernel makes the kernel image for a root. Its length does not depend on the hash.
func (b bootSet) kernel(rootHash string) (k signedKernel, err error) {
	pub, ok := b.keys.PCR.Public().(*rsa.PublicKey)
	if !ok {
		return k, fmt.Errorf("the key for PCR policies is %T, want RSA", b.keys.PCR.Public())
	}
	pcrKey, err := pcrpolicy.EncodeKey(pub)
	if err != nil {
		return k, err
	}
	sections := []uki.Section{
		{Name: ".osrel", Data: []byte(bootRelease(b.version))},
		{Name: ".cmdline", Data: []byte(cmdline(rootHash, b.epoch, b.words))},
		{Name: ".uname", Data: []byte(b.release)},
		{Name: ".pcrpkey", Data: pcrKey},
		{Name: ".linux", Data: b.vmlinuz},
		{Name: ".initrd", Data: b.initramfs},
	}
	if k.pcr11, err = b.predict(sections); err != nil {
		return k, err
	}
	signature, err := pcrpolicy.Sign(b.keys.PCR, pcrpolicy.Policy{PCR11: k.pcr11, Epoch: b.epoch})
	if err != nil {
		return k, err
	}
	if k.image, err = uki.Build(b.stub, append(sections, uki.Section{Name: ".pcrsig", Data: signature})); err != nil {
		return k, fmt.Errorf("kernel image: %w", err)
	}
	if k.image, err = uki.Sign(k.image, b.keys.Boot, epoch); err != nil {
		return k, fmt.Errorf("kernel image: %w", err)
	}
	// A key in a token may be another one than its certificate says.
	return k, uki.Verify(k.image, b.keys.Boot.Certificate)
}

// predict tells PCR 11. The stub's own .sbat counts too; its code does not.
func (b bootSet) predict(sections []uki.Section) (pcrpolicy.Digest, error) {
	own, err := uki.Sections(b.stub)
	if err != nil {
		return pcrpolicy.Digest{}, fmt.Errorf("stub: %w", err)
	}
	var measured []pcrpolicy.Section
	for _, s := range own {
		if s.Name == ".sbat" {
			measured = append(measured, pcrpolicy.Section(s))
		}
	}
	for _, s := range sections {
		measured = append(measured, pcrpolicy.Section(s))
	}
	return pcrpolicy.PredictPCR11(measured)
}

// check is the proof of fit, before anything is packed: of the kernel image, with any hash, twice in the EFI partition.
func (b bootSet) check() error {
	k, err := b.kernel(strings.Repeat("0", 64))
	if err != nil {
		return err
	}
	return espFits(b.files(k), len(k.image))
}

func (b bootSet) files(k signedKernel) []espFile {
	return espFiles(b.version, b.loader, k.image, b.keys.Enrol)
}

// A BootImage is what the manifest says about the kernel image.
type BootImage struct {
	Name  string `json:"name"`  // on the EFI partition
	PCR11 string `json:"pcr11"` // SHA-256, in hex: what the TPM has when systemd's stub has started it
}

func (b bootSet) describe(k signedKernel) BootImage {
	return BootImage{kernelName(1, b.version), hex.EncodeToString(k.pcr11[:])}
}

// publicKeys are what a node trusts, by their names in /usr/share/bulkhead.
func (k Keys) publicKeys() (map[string][]byte, error) {
	texts, err := k.texts()
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{"release.pub": texts["release.pub"], "pcr.pub": texts["pcr.pub"]}
	for name, signed := range k.Enrol { // what a node can write into its firmware
		out[name] = signed
	}
	return out, nil
}
