package image

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// writeCPIO writes the tree as a newc archive, the form the kernel takes for an initramfs. Owners are root, times are
// zero and inode numbers count up, so that equal trees give equal bytes.
func writeCPIO(w io.Writer, t Tree) error {
	c := &cpioWriter{w: w}
	for _, e := range t {
		name := strings.TrimPrefix(e.Path, "/")
		if name == "" {
			continue // the root is there already
		}
		data, mode := e.Data, uint32(e.Mode.Perm())
		switch e.Mode.Type() {
		case fs.ModeDir:
			mode |= 0o040000
		case fs.ModeSymlink:
			mode, data = mode|0o120000, []byte(e.Link)
		default:
			mode |= 0o100000
		}
		if e.Host != "" {
			var err error
			if data, err = os.ReadFile(e.Host); err != nil {
				return err
			}
		}
		c.entry(name, mode, data)
	}
	c.entry("TRAILER!!!", 0, nil)
	return c.err
}

type cpioWriter struct {
	w   io.Writer
	ino int
	err error
}

// entry writes a header of 110 bytes and the name, then the content, each padded to four bytes.
func (c *cpioWriter) entry(name string, mode uint32, data []byte) {
	c.ino++
	links := 1
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, b := range [][]byte{[]byte(head), data} {
		if c.err == nil {
			_, c.err = c.w.Write(append(b[:len(b):len(b)], make([]byte, -len(b)&3)...))
		}
	}
}
