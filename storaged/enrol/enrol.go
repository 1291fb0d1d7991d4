// Package enrol teaches a firmware that is in setup mode whom Secure Boot is to trust, by the kernel's files of the firmware's variables.
//
// It writes what the image's maker has signed in advance, and only into a firmware that has no keys: what somebody else has put there is never
// replaced. It makes no signature and checks none; the firmware does.
package enrol

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Namespaces of the firmware's variables (UEFI specification, 3.3 and 32.6.1).
const (
	global   = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	security = "-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
)

// names are the variables in the order in which they are written: the firmware leaves setup mode with the last one.
var names = []struct{ name, file string }{{"db", "db" + security}, {"KEK", "KEK" + global}, {"PK", "PK" + global}}

const (
	// attributes are: kept, readable before and after the system's start, written with a signature that has a time.
	attributes = 0x01 | 0x02 | 0x04 | 0x20
	// maxUpdate is more than any .auth file of one certificate has, in bytes.
	maxUpdate = 64 << 10
	// maxSignature is more than the signatures in an image take, in bytes.
	maxSignature = 256 << 10
)

var le = binary.LittleEndian

// Firmware is where the kernel shows the firmware's variables: /sys/firmware/efi/efivars.
type Firmware string

// State is what the firmware says of itself.
type State struct {
	Setup  bool // it has no platform key: whoever runs may write keys
	Secure bool // Secure Boot was on when the machine started
}

// State reads it. The error is fs.ErrNotExist on a machine that was not started by UEFI.
func (f Firmware) State() (s State, err error) {
	setup, err := f.value("SetupMode" + global)
	if err != nil {
		return s, err
	}
	// A firmware may have none; and once it has got keys, OVMF's cannot be read any more until the machine restarts (EINVAL).
	secure, err := f.value("SecureBoot" + global)
	if err != nil {
		secure = nil
	}
	return State{Setup: bytes.Equal(setup, []byte{1}), Secure: bytes.Equal(secure, []byte{1})}, nil
}

// value reads a variable, without its attributes.
func (f Firmware) value(file string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(string(f), file))
	if err == nil && len(b) < 4 {
		err = fmt.Errorf("%s: %d bytes", file, len(b))
	}
	if err != nil {
		return nil, err
	}
	return b[4:], nil
}

// Keys are what is to be enrolled: the .auth files of db, KEK and PK.
type Keys map[string]update

// An update is what the firmware takes for one variable.
type update struct {
	signed []byte // with the signature
	value  []byte // what the variable is then: signature lists
}

// ReadKeys reads the files of a folder.
func ReadKeys(dir string) (Keys, error) {
	keys := Keys{}
	for _, n := range names {
		path := filepath.Join(dir, n.name+".auth")
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(io.LimitReader(f, maxUpdate+1))
		f.Close()
		if err == nil && len(b) > maxUpdate {
			err = fmt.Errorf("more than %d bytes", maxUpdate)
		}
		u := update{signed: b}
		if err == nil {
			u.value, err = unsigned(b)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		keys[n.name] = u
	}
	return keys, nil
}

// unsigned returns what stands behind EFI_VARIABLE_AUTHENTICATION_2: a time and a certificate that says how long it is.
func unsigned(b []byte) ([]byte, error) {
	const stamp = 16
	if len(b) < stamp+24 || le.Uint16(b[stamp+6:]) != 0x0ef1 { // WIN_CERT_TYPE_EFI_GUID
		return nil, errors.New("it is no signed update of a variable")
	}
	n := stamp + int64(le.Uint32(b[stamp:]))
	if n < stamp+24 || n >= int64(len(b)) {
		return nil, errors.New("it is no signed update of a variable, or cut off")
	}
	return b[n:], nil
}

var typeX509 = gpt.MustGUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")

// certificates returns those in signature lists (EFI_SIGNATURE_LIST), as DER.
func certificates(lists []byte) (out [][]byte, err error) {
	const header, owner = 28, 16
	for len(lists) > 0 {
		if len(lists) < header {
			return nil, errors.New("a signature list is cut off")
		}
		size, skip, each := int64(le.Uint32(lists[16:])), int64(le.Uint32(lists[20:])), int64(le.Uint32(lists[24:]))
		if size > int64(len(lists)) || size < header+skip || each <= owner {
			return nil, errors.New("a signature list has impossible lengths")
		}
		kind := typeX509.OnDisk()
		for at := header + skip; bytes.Equal(lists[:16], kind[:]) && at+each <= size; at += each {
			out = append(out, lists[at+owner:at+each])
		}
		lists = lists[size:]
	}
	return out, nil
}

// Enrol writes the keys. What is there already, from a try that was interrupted, is left; anything else that is there is an error, and then nothing is
// written.
func (f Firmware) Enrol(keys Keys) error {
	var todo []int
	for i, n := range names {
		have, err := f.value(n.file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			todo = append(todo, i)
		case err != nil:
			return err
		case !bytes.Equal(have, keys[n.name].value):
			return fmt.Errorf("the firmware has a %s of somebody else's: delete all Secure Boot keys in its setup first", n.name)
		}
	}
	for _, i := range todo {
		if err := f.write(names[i].file, keys[names[i].name].signed); err != nil {
			return fmt.Errorf("the firmware does not take %s: %w", names[i].name, err)
		}
	}
	return nil
}

// write makes a variable, in the one write that the kernel wants. Of one that the firmware refused no file may be left.
func (f Firmware) write(file string, signed []byte) error {
	path := filepath.Join(string(f), file)
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := unix.Write(fd, append(le.AppendUint32(nil, attributes), signed...))
	if err == nil && n != 4+len(signed) {
		err = io.ErrShortWrite
	}
	err = errors.Join(err, unix.Close(fd))
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// Covers reports whether a PE image has a signature that names one of db's certificates: whether the firmware will start it. The signature itself
// is not verified here.
func (k Keys) Covers(image io.ReaderAt, size int64) (bool, error) {
	certs, err := certificates(k["db"].value)
	if err != nil {
		return false, err
	}
	table, err := signatures(image, size)
	if err != nil {
		return false, err
	}
	for _, c := range certs {
		if bytes.Contains(table, c) {
			return true, nil
		}
	}
	return false, nil
}

// signatures returns the attribute certificate table of a 64-bit PE image; nil if it has none.
func signatures(image io.ReaderAt, size int64) ([]byte, error) {
	const optional, directory = 24, 112 + 4*8 // behind the PE header; the fifth entry of the data directories
	b := make([]byte, 64)
	if _, err := image.ReadAt(b, 0); err != nil || b[0] != 'M' || b[1] != 'Z' {
		return nil, errors.Join(errors.New("it is no PE image"), err)
	}
	pe := int64(le.Uint32(b[60:]))
	b = make([]byte, optional+directory+8)
	if _, err := image.ReadAt(b, pe); err != nil || string(b[:4]) != "PE\x00\x00" || le.Uint16(b[optional:]) != 0x20b {
		return nil, errors.Join(errors.New("it is no 64-bit PE image"), err)
	}
	at, n := int64(le.Uint32(b[optional+directory:])), int64(le.Uint32(b[optional+directory+4:]))
	if n == 0 {
		return nil, nil
	}
	if n > maxSignature || at+n > size {
		return nil, errors.New("its signatures lie outside of it")
	}
	table := make([]byte, n)
	_, err := image.ReadAt(table, at)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return table, err
}
