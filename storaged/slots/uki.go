package slots

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

// Limits of what is read of a kernel, in bytes.
const (
	maxSections = 96
	maxCmdline  = 64 << 10
)

// A kernel says in its command line, which is signed with it, what it starts.
type kernel struct {
	root  bundle.Digest // of the root that it verifies
	epoch int           // 0 if it names none
}

// readKernel reads the command line of a unified kernel image: the section .cmdline of a PE file.
func readKernel(r io.ReaderAt, size int64) (kernel, error) {
	line, err := readSection(r, size, ".cmdline", maxCmdline)
	if err != nil {
		return kernel{}, err
	}
	return parseCmdline(string(line))
}

// parseCmdline finds our words in a kernel's command line.
func parseCmdline(line string) (k kernel, err error) {
	for word := range strings.FieldsSeq(strings.TrimRight(line, "\x00")) {
		if v, ok := strings.CutPrefix(word, "bulkhead.verity="); ok {
			if k.root != (bundle.Digest{}) {
				return kernel{}, errors.New("command line: two root hashes")
			}
			if k.root, err = bundle.ParseDigest(strings.ToLower(v)); err != nil {
				return kernel{}, fmt.Errorf("command line: %w", err)
			}
		}
		if v, ok := strings.CutPrefix(word, "bulkhead.epoch="); ok {
			if k.epoch, err = strconv.Atoi(v); err != nil || k.epoch < 1 || k.epoch > bundle.MaxEpoch {
				return kernel{}, fmt.Errorf("command line: epoch %.20q is not within 1 and %d", v, bundle.MaxEpoch)
			}
		}
	}
	if k.root == (bundle.Digest{}) {
		return kernel{}, errors.New("command line: no root hash (bulkhead.verity=)")
	}
	return k, nil
}

// readSection returns the content of a section of a PE file.
func readSection(r io.ReaderAt, size int64, name string, limit int64) ([]byte, error) {
	le := binary.LittleEndian
	read := func(at, n int64) ([]byte, error) {
		if at < 0 || n < 0 || at > size-n {
			return nil, errors.New("no PE file: it ends too early")
		}
		b := make([]byte, n)
		if _, err := r.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		return b, nil
	}
	dos, err := read(0, 64)
	if err != nil || string(dos[:2]) != "MZ" {
		return nil, errors.Join(errors.New("no PE file"), err)
	}
	at := int64(le.Uint32(dos[60:]))
	coff, err := read(at, 24)
	if err != nil || string(coff[:4]) != "PE\x00\x00" {
		return nil, errors.Join(errors.New("no PE file"), err)
	}
	count, optional := int64(le.Uint16(coff[6:])), int64(le.Uint16(coff[20:]))
	if count > maxSections {
		return nil, fmt.Errorf("no PE file of ours: %d sections", count)
	}
	table, err := read(at+24+optional, count*40)
	if err != nil {
		return nil, err
	}
	for ; len(table) > 0; table = table[40:] {
		if strings.TrimRight(string(table[:8]), "\x00") != name[:min(len(name), 8)] {
			continue
		}
		length := min(int64(le.Uint32(table[8:])), int64(le.Uint32(table[16:]))) // what is used of it, and what the file has
		if length > limit {
			return nil, fmt.Errorf("section %s: %d bytes; at most %d are allowed", name, length, limit)
		}
		return read(int64(le.Uint32(table[20:])), length)
	}
	return nil, fmt.Errorf("it has no section %s", name)
}
