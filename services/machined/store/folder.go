package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// maxNames bounds a listing; a healthy folder has Keep files.
const maxNames = 4096

// Folder is a real folder. The zero value is not usable; see OpenFolder.
type Folder struct{ root *os.Root }

// OpenFolder opens a folder, making it below its parent if needed. The caller closes it.
func OpenFolder(parent, name string) (*Folder, error) {
	up, err := os.OpenRoot(parent)
	if err != nil {
		return nil, err
	}
	defer up.Close()
	if err := up.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	} else if err == nil {
		if err := syncFolder(up); err != nil {
			return nil, err
		}
	}
	root, err := up.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &Folder{root}, nil
}

// Close closes the folder; its files stay.
func (f *Folder) Close() error { return f.root.Close() }

// Names implements FS.
func (f *Folder) Names() ([]string, error) {
	d, err := f.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(maxNames)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// Read implements FS.
func (f *Folder) Read(name string, most int64) ([]byte, error) {
	file, err := f.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("damaged: more than %d bytes", most)
	}
	return data, err
}

// Write implements FS.
func (f *Folder) Write(name string, data []byte) error {
	file, err := f.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// Rename implements FS.
func (f *Folder) Rename(from, to string) error { return f.root.Rename(from, to) }

// Remove implements FS.
func (f *Folder) Remove(name string) error { return f.root.Remove(name) }

// Sync implements FS.
func (f *Folder) Sync() error { return syncFolder(f.root) }

func syncFolder(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
