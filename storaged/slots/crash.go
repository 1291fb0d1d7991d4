package slots

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Bounds of what the kernel left when it panicked.
const (
	maxCrash   = 64 << 10 // bytes of one record
	maxCrashes = 64
)

// A Crash is one record of pstore.
type Crash struct {
	Name string
	Time time.Time // when the record was written, as far as the firmware knew
	Text string
}

// pstore is where the kernel shows what it wrote into the firmware's memory, or into memory that survives a restart.
func (l *Linux) pstore() string { return filepath.Join(l.sys, "fs/pstore") }

// crashes returns what is there, in the order of the names. It is none where the kernel has no pstore.
func (l *Linux) crashes() ([]Crash, error) {
	all, err := os.ReadDir(l.pstore())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []Crash
	for _, e := range all[:min(len(all), maxCrashes)] {
		if !e.Type().IsRegular() {
			continue
		}
		c := Crash{Name: e.Name()}
		if c.Text, c.Time, err = readTail(filepath.Join(l.pstore(), e.Name())); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// readTail returns the end of a record.
func readTail(path string) (string, time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", time.Time{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", time.Time{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, 16*maxCrash))
	if n := len(b) - maxCrash; n > 0 {
		b = b[n:]
	}
	return strings.ToValidUTF8(string(b), "?"), fi.ModTime(), err
}

// removeCrash deletes a record, which frees the firmware's memory.
func (l *Linux) removeCrash(name string) error {
	if name == "" || strings.ContainsAny(name, "/\x00") || name[0] == '.' {
		return fs.ErrInvalid
	}
	err := os.Remove(filepath.Join(l.pstore(), name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
