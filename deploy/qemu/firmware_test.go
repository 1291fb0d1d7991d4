package qemu

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu/ovmf"
	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

// addCertificates puts certificates into an image as mkimage does; who owns the keys does not matter here.
func addCertificates(t *testing.T, image string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range certificates {
		c := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(image, name), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestVars(t *testing.T) {
	if _, err := os.Stat(firmwareVars); err != nil {
		testtool.Path(t, firmwareVars, "ovmf")
	}
	image := anImage(t)
	m := aMachine(t)
	m.Firmware, m.SecureBoot = UEFI, true
	if err := m.Create(image, nil); err == nil || !strings.Contains(err.Error(), "PK.crt") {
		t.Fatalf("an image without certificates: %v", err)
	}
	addCertificates(t, image)
	if err := m.Create(image, nil); err != nil {
		t.Fatal(err)
	}
	flash, err := os.ReadFile(m.path(VarsFile))
	if err != nil {
		t.Fatal(err)
	}
	vars, err := ovmf.Read(flash)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, v := range vars {
		found[v.Name] = string(v.Value)
	}
	for _, name := range []string{"PK", "KEK", "db"} {
		if !strings.Contains(found[name], name+".crt") { // the subject's name
			t.Errorf("%s is not the image's: %q", name, found[name])
		}
	}
	if found["SecureBootEnable"] != "\x01" {
		t.Error("Secure Boot is off")
	}
}

// A machine's TPM runs once, ends when it is told to, and keeps its state.
func TestTPM(t *testing.T) {
	testtool.Path(t, tpmProgram, "swtpm")
	m := aMachine(t)
	// Deeper than a socket's name may be long.
	m.Dir = filepath.Join(m.Dir, strings.Repeat("deep/", 25))
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if conn, err := m.startTPM(t.Context()); conn != nil || err != nil {
		t.Fatalf("a machine without a TPM: %v, %v", conn, err)
	}
	m.TPM = true
	for range 2 {
		conn, err := m.startTPM(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if m.process(tpmPidFile, tpmProgram) == nil {
			t.Fatal("it does not run")
		}
		if other := (Machine{Name: "other", Dir: t.TempDir()}); other.process(tpmPidFile, tpmProgram) != nil {
			t.Error("another machine has it too")
		}
		conn.Close()
		if err := m.stopTPM(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if m.process(tpmPidFile, tpmProgram) != nil { // a zombie is none
			t.Error("it still runs")
		}
		if fi, err := os.Stat(m.path(TPMFolder)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("its state: %v, %v", fi, err)
		}
	}
	start := time.Now()
	if err := m.stopTPM(t.Context(), time.Minute); err != nil || time.Since(start) > 10*time.Second {
		t.Errorf("to stop one that does not run took %s: %v", time.Since(start), err)
	}
}

func TestCheckFirmware(t *testing.T) {
	m := aMachine(t)
	m.Memory = 256
	m.TPM = true
	t.Setenv("PATH", t.TempDir())
	if err := m.Check(); err == nil || !strings.Contains(err.Error(), "swtpm is missing: install the package swtpm") {
		t.Errorf("got %v", err)
	}
}
