package qemu

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/bulkhead-os/bulkhead/deploy/qemu/ovmf"
)

// UEFI is the firmware of Machine.Firmware that boots the disk as real machines do. With "" QEMU starts the image's kernel itself.
const UEFI = "uefi"

// Where Debian's and Ubuntu's package ovmf has the firmware: one with Secure Boot and the protected memory (SMM) that it needs, one
// without either, and the variables that both start with.
const (
	firmwareSecure = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	firmwarePlain  = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	firmwareVars   = "/usr/share/OVMF/OVMF_VARS_4M.fd"

	VarsFile = "vars.fd" // this machine's own variables, in its folder
)

// certificates are whom a firmware with Secure Boot trusts, by their file names in an image and in a machine's folder.
var certificates = []string{"PK.crt", "KEK.crt", "db.crt"}

func (m Machine) firmwareCode() string {
	if m.SecureBoot {
		return firmwareSecure
	}
	return firmwarePlain
}

// checkFirmware says what the host lacks.
func (m Machine) checkFirmware() error {
	var errs []error
	if m.Firmware == UEFI {
		for _, file := range []string{m.firmwareCode(), firmwareVars} {
			if _, err := os.Stat(file); err != nil {
				errs = append(errs, fmt.Errorf("%s is missing: install the package ovmf (on Debian and Ubuntu)", file))
			}
		}
	}
	return errors.Join(append(errs, m.checkTPM())...)
}

// makeVars gives the machine variables of its own. With Secure Boot they say that only the image's keys count, as if a person had
// enrolled them in the firmware's menu.
func (m Machine) makeVars() error {
	if m.Firmware != UEFI {
		return nil
	}
	flash, err := os.ReadFile(firmwareVars)
	if err != nil {
		return err
	}
	if m.SecureBoot {
		var certs [3]*x509.Certificate
		for i, name := range certificates {
			if certs[i], err = readCertificate(filepath.Join(m.Dir, name)); err != nil {
				return err
			}
		}
		if err := ovmf.Write(flash, ovmf.Secure(certs[0], certs[1], certs[2])...); err != nil {
			return fmt.Errorf("%s: %w", firmwareVars, err)
		}
	}
	return os.WriteFile(filepath.Join(m.Dir, VarsFile), flash, 0o600)
}

func readCertificate(file string) (*x509.Certificate, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s: not PEM", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// firmwareArgs make QEMU start the firmware, which then boots the disk.
func (m Machine) firmwareArgs() []string {
	a := []string{
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + m.firmwareCode(),
		"-drive", "if=pflash,unit=1,format=raw,file=" + VarsFile,
	}
	if m.SecureBoot { // only the firmware's protected code may write its variables
		a = append(a, "-global", "driver=cfi.pflash01,property=secure,value=on")
	}
	return a
}
