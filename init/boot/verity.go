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
	if len(b) < superblockSize || string(b[:8]) != "verity\x00\x00" {
		return superblock{}, errors.New("no verity superblock")
	}
	if version, kind := le.Uint32(b[8:]), le.Uint32(b[12:]); version != 1 || kind != 1 {
		return superblock{}, errors.New("verity superblock: version " + strconv.Itoa(int(version)) + ", hash type " + strconv.Itoa(int(kind)) + "; both must be 1")
	}
	if name := strings.TrimRight(string(b[32:64]), "\x00"); name != "sha256" {
		return superblock{}, errors.New("verity superblock: algorithm " + strconv.Quote(name) + " is not sha256")
	}
	s := superblock{dataBlock: uint64(le.Uint32(b[64:])), hashBlock: uint64(le.Uint32(b[68:])), dataBlocks: le.Uint64(b[72:])}
	for _, size := range []uint64{s.dataBlock, s.hashBlock} {
		if size < 512 || size > 4096 || size&(size-1) != 0 {
			return superblock{}, errors.New("verity superblock: block size " + strconv.FormatUint(size, 10) + " is not 512, 1024, 2048 or 4096")
		}
	}
	if s.dataBlocks == 0 || s.dataBlocks > rootBytes/s.dataBlock {
		return superblock{}, errors.New("verity superblock: " + strconv.FormatUint(s.dataBlocks, 10) + " blocks do not fit the root partition")
	}
	blocks, perBlock := uint64(1), s.hashBlock/digestSize // the superblock has a block to itself
	for n := s.dataBlocks; n > 1; {
		n = (n + perBlock - 1) / perBlock
		blocks += n
	}
	if blocks > treeBytes/s.hashBlock {
		return superblock{}, errors.New("verity superblock: the hash tree does not fit its partition")
	}
	n := int(le.Uint16(b[80:]))
	if n > 256 {
		return superblock{}, errors.New("verity superblock: salt of " + strconv.Itoa(n) + " bytes, at most 256 are possible")
	}
	s.salt = b[88 : 88+n]
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
	u := func(n uint64) string { return strconv.FormatUint(n, 10) }
	return strings.Join([]string{"1", root, tree, u(s.dataBlock), u(s.hashBlock), u(s.dataBlocks), "1", "sha256", hash, salt}, " ")
}

// Package encoding/hex would bring fmt, and that a fifth of PID 1's memory.
const digits = "0123456789abcdef"

func toHex(b []byte) string {
	var out []byte
	for _, c := range b {
		out = append(out, digits[c>>4], digits[c&15])
	}
	return string(out)
}

// fromHex accepts small and capital digits.
func fromHex(s string) (out []byte, err error) {
	for ; len(s) >= 2 && err == nil; s = s[2:] {
		var n uint64
		n, err = strconv.ParseUint(s[:2], 16, 8)
		out = append(out, byte(n))
	}
	if s != "" && err == nil {
		err = errors.New("an odd number of hex digits")
	}
	return out, err
}
