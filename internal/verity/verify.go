package verity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A Superblock is the first block of what WriteTo writes: how the tree was built.
type Superblock struct {
	Blocks uint64 // of data
	Salt   []byte
	UUID   [16]byte
}

// ParseSuperblock reads a superblock of the one kind that Build makes.
func ParseSuperblock(b []byte) (Superblock, error) {
	le := binary.LittleEndian
	if len(b) < BlockSize || string(b[:8]) != "verity\x00\x00" || le.Uint32(b[8:]) != 1 || le.Uint32(b[12:]) != 1 {
		return Superblock{}, errors.New("no verity superblock of version 1 and hash type 1")
	}
	if !bytes.Equal(bytes.TrimRight(b[32:64], "\x00"), []byte("sha256")) || le.Uint32(b[64:]) != BlockSize || le.Uint32(b[68:]) != BlockSize {
		return Superblock{}, fmt.Errorf("verity superblock: not SHA-256 over blocks of %d bytes", BlockSize)
	}
	s := Superblock{Blocks: le.Uint64(b[72:]), UUID: [16]byte(b[16:32])}
	salt := int(le.Uint16(b[80:]))
	if s.Blocks == 0 || s.Blocks > 1<<32 || salt > maxSalt {
		return Superblock{}, errors.New("verity superblock: impossible values")
	}
	s.Salt = bytes.Clone(b[88 : 88+salt])
	return s, nil
}

// Verify reads data and tree whole and reports whether the root hash vouches for all of both: then no read through dm-verity can fail
// but for the disk's sake. data may go on behind what the tree covers; size is how much there is. It holds the tree in memory.
func Verify(data io.Reader, size int64, tree io.Reader, root [sha256.Size]byte) error {
	first := make([]byte, BlockSize)
	if _, err := io.ReadFull(tree, first); err != nil {
		return fmt.Errorf("read the hash tree: %w", err)
	}
	s, err := ParseSuperblock(first)
	if err != nil {
		return err
	}
	length := int64(s.Blocks) * BlockSize
	if length > size {
		return fmt.Errorf("verity superblock: %d blocks are more than the %d bytes that there are", s.Blocks, size)
	}
	t, err := Build(io.LimitReader(data, length), s.Salt, s.UUID)
	switch {
	case err != nil:
		return fmt.Errorf("read the data: %w", err)
	case t.blocks != s.Blocks:
		return fmt.Errorf("the data end after %d of %d blocks", t.blocks, s.Blocks)
	case t.Root != root:
		return fmt.Errorf("the data have the root hash %x, want %x", t.Root, root)
	}
	_, err = t.WriteTo(&comparer{r: io.MultiReader(bytes.NewReader(first), tree), buf: make([]byte, BlockSize)})
	return err
}

// A comparer takes only what its reader holds too.
type comparer struct {
	r   io.Reader
	buf []byte
	at  int64
}

func (c *comparer) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		n := min(len(b)-done, len(c.buf))
		if _, err := io.ReadFull(c.r, c.buf[:n]); err != nil {
			return done, fmt.Errorf("read the hash tree: %w", err)
		}
		if !bytes.Equal(c.buf[:n], b[done:done+n]) {
			return done, fmt.Errorf("the hash tree is wrong in the block at byte %d", c.at)
		}
		done, c.at = done+n, c.at+int64(n)
	}
	return len(b), nil
}
