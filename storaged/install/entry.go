package install

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Of the UEFI specification 2.10: where global variables are, what a load option is (section 3.1.3), and the nodes of its device path (10.3.5).
const (
	globalVariable = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	maxVariable    = 16 << 10 // bytes

	// attributes of a variable that stays, and that boot loader and system may read.
	attributes   = 1 | 2 | 4
	optionActive = 1

	mediaPath    = 4 // kind of a node
	hardDrive    = 1
	filePath     = 4
	byGPT        = 2 // how a hard drive's node names a partition
	endOfPath    = "\x7f\xff\x04\x00"
	description  = "Bulkhead"
	loaderPath   = `\EFI\BOOT\BOOTX64.EFI`
	bootOrder    = "BootOrder"
	bootVariable = "Boot"
)

// Prefer makes the firmware start the disk with that EFI partition before all others: it writes a boot entry, unless there is one, and puts it first.
// vars is where the firmware's variables are mounted (efivarfs). A firmware that keeps no entries starts the disk by itself, or what it likes.
func Prefer(vars string, esp gpt.Partition) error {
	want := loadOption(esp)
	all, err := os.ReadDir(vars)
	if err != nil {
		return err
	}
	used := map[uint16]bool{}
	number, found := uint16(0), false
	for _, e := range all {
		n, ok := entryNumber(e.Name())
		if !ok {
			continue
		}
		used[n] = true
		if data, err := readVariable(vars, e.Name()); err == nil && bytes.Equal(data, want) {
			number, found = n, true
		}
	}
	if !found {
		for used[number] {
			if number++; number == 0 {
				return errors.New("all numbers of boot entries are taken")
			}
		}
		if err := writeVariable(vars, fmt.Sprintf("%s%04X%s", bootVariable, number, globalVariable), want); err != nil {
			return fmt.Errorf("boot entry: %w", err)
		}
	}
	order, err := readVariable(vars, bootOrder+globalVariable)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	next := binary.LittleEndian.AppendUint16(nil, number)
	for o := order; len(o) >= 2; o = o[2:] {
		if n := binary.LittleEndian.Uint16(o); n != number {
			next = binary.LittleEndian.AppendUint16(next, n)
		}
	}
	if bytes.Equal(order, next) {
		return nil
	}
	if err := writeVariable(vars, bootOrder+globalVariable, next); err != nil {
		return fmt.Errorf("boot order: %w", err)
	}
	return nil
}

// entryNumber reads the number out of a variable's name: "Boot002A-8be4df61-…".
func entryNumber(name string) (n uint16, ok bool) {
	digits, ok := strings.CutSuffix(name, globalVariable)
	digits, isBoot := strings.CutPrefix(digits, bootVariable)
	if !ok || !isBoot || len(digits) != 4 {
		return 0, false
	}
	_, err := fmt.Sscanf(digits, "%04X", &n)
	return n, err == nil && fmt.Sprintf("%04X", n) == digits
}

// loadOption is what a boot entry holds.
func loadOption(esp gpt.Partition) []byte {
	le := binary.LittleEndian
	drive := []byte{mediaPath, hardDrive, 42, 0}
	drive = le.AppendUint32(drive, uint32(esp.Number))
	drive = le.AppendUint64(drive, esp.First)
	drive = le.AppendUint64(drive, esp.Last-esp.First+1)
	guid := esp.GUID.OnDisk()
	drive = append(drive, guid[:]...)
	drive = append(drive, byGPT, byGPT) // the kind of table, the kind of name
	file := text(loaderPath)
	path := slices.Concat(drive, []byte{mediaPath, filePath, byte(4 + len(file)), 0}, file, []byte(endOfPath))
	out := le.AppendUint32(nil, optionActive)
	out = le.AppendUint16(out, uint16(len(path)))
	return slices.Concat(out, text(description), path)
}

// text is how UEFI writes a text.
func text(s string) (out []byte) {
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		out = binary.LittleEndian.AppendUint16(out, u)
	}
	return out
}

// readVariable returns a variable without its attributes.
func readVariable(vars, name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(vars, name))
	if err != nil {
		return nil, err
	}
	if len(b) < 4 || len(b) > maxVariable {
		return nil, fmt.Errorf("variable %s: %d bytes", name, len(b))
	}
	return b[4:], nil
}

// writeVariable makes or replaces a variable: by one write, as efivarfs wants it.
func writeVariable(vars, name string, data []byte) error {
	f, err := os.OpenFile(filepath.Join(vars, name), os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(binary.LittleEndian.AppendUint32(nil, attributes), data...))
	return errors.Join(err, f.Close())
}
