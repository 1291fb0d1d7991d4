package boot

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/hardening"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// setParams sets kernel parameters. One that cannot be set is told: a node with one protection less is better than none, and its health
// says so.
func setParams(late bool) error {
	for _, p := range slices.Concat(operation, hardening.Params) {
		if p.Late != late {
			continue
		}
		if err := poke(p.Path(), p.Value+"\n"); err != nil {
			console.Say("bulkhead: ", p.Name, " is not ", p.Value, ": ", err.Error())
		}
	}
	return nil
}

// Report reads back the kernel parameters that protect the node and writes hardening.ParamsFile anew. An error is told.
func Report() {
	text := make([]byte, 0, 4096)
	for _, p := range hardening.Params {
		if value, err := peek(p.Path()); err == nil {
			text = append(append(append(append(text, p.Name...), '\t'), hardening.Plain(value)...), '\n')
		}
	}
	const path, next = hardening.ParamsFile, hardening.ParamsFile + ".new"
	os.Mkdir(unit.RunDir+"/boot", 0o755) // what is wrong, the next line says
	var f console.First
	f.Try("write", os.WriteFile(next, text, 0o444))
	f.Try("rename", os.Rename(next, path))
	if f.Err != nil {
		console.Say("bulkhead: cannot tell kernel parameters: ", f.Err.Error())
	}
}

// peek and poke read and write a small file without package os, which would keep much more memory for it.
func peek(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var b [256]byte
	n, err := unix.Read(fd, b[:])
	return string(b[:max(n, 0)]), err
}

func poke(path, text string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(text))
	return err
}
