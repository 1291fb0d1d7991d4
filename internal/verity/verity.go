// Package verity builds and checks dm-verity hash trees: format 1, SHA-256, blocks of 4096 bytes, as veritysetup(8) does.
// It is pure: it reads from the reader it is given and holds the tree, not the data, in memory (1/128 of the data).
package verity

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
)

// BlockSize is that of data and of hashes, in bytes.
const BlockSize = 4096

const maxSalt = 256

// A Tree is the hash tree of some data. Build makes it.
type Tree struct {
	Root   [sha256.Size]byte // what must be known to trust the data
	blocks uint64            // of data
	salt   []byte
	uuid   [16]byte
	levels [][]byte // padded to blocks; the last one is the top
}

// Build reads all data from r, which must be a positive multiple of BlockSize. The uuid only marks the superblock.
func Build(r io.Reader, salt []byte, uuid [16]byte) (*Tree, error) {
	if len(salt) > maxSalt {
		return nil, fmt.Errorf("salt of %d bytes: more than %d", len(salt), maxSalt)
	}
	t := &Tree{salt: salt, uuid: uuid}
	h := sha256.New()
	var level []byte
	for block := make([]byte, BlockSize); ; {
		if _, err := io.ReadFull(r, block); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("block %d: %w", t.blocks, err)
		}
		level = t.sum(h, level, block)
		t.blocks++
	}
	if t.blocks == 0 {
		return nil, errors.New("no data")
	}
	for len(level) > sha256.Size {
		level = append(level, make([]byte, -len(level)&(BlockSize-1))...)
		t.levels = append(t.levels, level)
		var above []byte
		for b := level; len(b) > 0; b = b[BlockSize:] {
			above = t.sum(h, above, b[:BlockSize])
		}
		level = above
	}
	t.Root = [sha256.Size]byte(level)
	return t, nil
}

func (t *Tree) sum(h hash.Hash, to, block []byte) []byte {
	h.Reset()
	h.Write(t.salt)
	h.Write(block)
	return h.Sum(to)
}

// Size returns the length of what WriteTo writes, in bytes.
func (t *Tree) Size() int64 {
	n := int64(BlockSize)
	for _, l := range t.levels {
		n += int64(len(l))
	}
	return n
}

// WriteTo writes the superblock, in a block of its own, and the tree from its top to its leaves.
func (t *Tree) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(t.superblock())
	total := int64(n)
	for i := len(t.levels) - 1; i >= 0 && err == nil; i-- {
		n, err = w.Write(t.levels[i])
		total += int64(n)
	}
	return total, err
}

func (t *Tree) superblock() []byte {
	b := make([]byte, BlockSize)
	le := binary.LittleEndian
	copy(b, "verity\x00\x00")
	le.PutUint32(b[8:], 1)  // version of the superblock
	le.PutUint32(b[12:], 1) // format: salt first
	copy(b[16:], t.uuid[:])
	copy(b[32:], "sha256")
	le.PutUint32(b[64:], BlockSize)
	le.PutUint32(b[68:], BlockSize)
	le.PutUint64(b[72:], t.blocks)
	le.PutUint16(b[80:], uint16(len(t.salt)))
	copy(b[88:], t.salt)
	return b
}
