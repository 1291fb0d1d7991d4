package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

const stampName = ".stamp"

// A stamp says what an image was made of, so that making it again from the same costs nothing.
type stamp struct {
	Digest string // of all inputs' content
	Files  map[string]seen
}

// seen is a file's content, valid as long as the file looks the same.
type seen struct {
	Size, MTime, CTime int64
	Inode              uint64
	SHA256             string
}

func readStamp(dir string) stamp {
	var s stamp
	text, err := os.ReadFile(filepath.Join(dir, stampName))
	if err != nil || json.Unmarshal(text, &s) != nil {
		return stamp{}
	}
	return s
}

// newStamp describes the inputs: texts, and files, whose content is only read if they changed since old.
func newStamp(old stamp, texts []string, files map[string]string) (stamp, error) {
	s := stamp{Files: map[string]seen{}}
	h := sha256.New()
	for _, t := range texts {
		fmt.Fprintf(h, "%d %s\n", len(t), t)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		file := files[name]
		fi, err := os.Stat(file)
		if err != nil {
			return stamp{}, err
		}
		now := seen{Size: fi.Size(), MTime: fi.ModTime().UnixNano()}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			now.Inode, now.CTime = st.Ino, st.Ctim.Nano()
		}
		now.SHA256 = old.Files[file].SHA256
		if old.Files[file] != now {
			o, err := describe(file)
			if err != nil {
				return stamp{}, err
			}
			now.SHA256 = o.SHA256
		}
		s.Files[file] = now
		fmt.Fprintf(h, "%s %s\n", name, now.SHA256)
	}
	s.Digest = hex.EncodeToString(h.Sum(nil))
	return s, nil
}

func (s stamp) write(dir string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, stampName), text, 0o644)
}

// complete says whether every file of the manifest is there in its size.
func complete(dir string, m Manifest) bool {
	for _, f := range m.Files {
		if fi, err := os.Stat(filepath.Join(dir, f.Name)); err != nil || fi.Size() != f.Size {
			return false
		}
	}
	return len(m.Files) > 0
}
