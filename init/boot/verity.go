package boot

import (
	"encoding/binary"
	"errors"
	"strconv"
	"strings"
)

const (
	superblockSize = 512
	digestSize     = 32 // SHA-256
)

// A superblock is what veritysetup writes in front of a hash tree. Nothing vouches for it but the root hash: a wrong value
// makes every read fail, so it is only checked for what could lead the kernel outside the partitions.
type superblock struct {
	dataBlock, hashBlock uint64 // bytes
	dataBlocks           uint64
	salt                 []byte
}

// parseSuperblock reads the superblock of a tree of treeBytes over a root of rootBytes.
func parseSuperblock(b []byte, rootBytes, treeBytes uint64) (superblock, error) {
	le := binary.LittleEndian
	if len(b) < superblockSize || string(b[:8]) != "verity\x00\x00" || le.Uint32(b[8:]) != 1 || le.Uint32(b[12:]) != 1 {
		return superblock{}, errors.New("no verity superblock of version 1 and hash type 1")
	}
	if name := strings.TrimRight(string(b[32:64]), "\x00"); name != "sha256" {
		return superblock{}, errors.New("verity superblock: algorithm " + strconv.Quote(name) + " is not sha256")
	}
	s := superblock{uint64(le.Uint32(b[64:])), uint64(le.Uint32(b[68:])), le.Uint64(b[72:]), nil}
	for _, size := range []uint64{s.dataBlock, s.hashBlock} {
		if size < 512 || size > 4096 || size&(size-1) != 0 {
			return superblock{}, errors.New("verity superblock: block size " + decimal(size) + " is not 512, 1024, 2048 or 4096")
		}
	}
	if s.dataBlocks == 0 || s.dataBlocks > rootBytes/s.dataBlock {
		return superblock{}, errors.New("verity superblock: " + decimal(s.dataBlocks) + " blocks do not fit the root partition")
	}
	blocks, perBlock := uint64(1), s.hashBlock/digestSize // the superblock has a block to itself
	for n := s.dataBlocks; n > 1; blocks += n {
		n = (n + perBlock - 1) / perBlock
	}
	if blocks > treeBytes/s.hashBlock {
		return superblock{}, errors.New("verity superblock: the hash tree does not fit its partition")
	}
	salt := int(le.Uint16(b[80:]))
	if salt > 256 {
		return superblock{}, errors.New("verity superblock: the salt is longer than 256 bytes")
	}
	s.salt = b[88 : 88+salt]
	return s, nil
}

// sectors is the length of the verified device, in units of 512 bytes.
func (s superblock) sectors() uint64 { return s.dataBlocks * s.dataBlock / 512 }

// table is the line for the device-mapper. A block that does not match reads as an I/O error, which is the default: one
// rotten block must not take a node down that never needs it.
func (s superblock) table(root, tree, hash string) string {
	salt := "-"
	if len(s.salt) > 0 {
		salt = toHex(s.salt)
	}
	return strings.Join([]string{"1", root, tree, decimal(s.dataBlock), decimal(s.hashBlock), decimal(s.dataBlocks), "1", "sha256", hash, salt}, " ")
}

func decimal(n uint64) string { return strconv.FormatUint(n, 10) }

// toHex is here because package encoding/hex brings fmt.
func toHex(b []byte) (out string) {
	const digits = "0123456789abcdef"
	for _, c := range b {
		out += string([]byte{digits[c>>4], digits[c&15]})
	}
	return out
}

// fromHex returns nil if anything is wrong.
func fromHex(s string) (out []byte) {
	if len(s)%2 != 0 {
		return nil
	}
	for ; s != ""; s = s[2:] {
		n, err := strconv.ParseUint(s[:2], 16, 8)
		if err != nil {
			return nil
		}
		out = append(out, byte(n))
	}
	return out
}
