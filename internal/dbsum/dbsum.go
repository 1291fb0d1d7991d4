// Package dbsum checks snapshots of etcd's database, as etcd's maintenance API sends them: the database, and behind it its SHA-256.
//
// It knows nothing of what is in a database.
package dbsum

import (
	"bytes"
	"crypto/sha256"
	"hash"
)

// Size is how many bytes the sum has at the end.
const Size = sha256.Size

// page is bbolt's smallest; a database is a multiple of it.
const page = 512

// Sum takes a snapshot that is written to it, in pieces of any size. The zero value is ready; it is not safe for concurrent use.
type Sum struct {
	h    hash.Hash
	tail []byte // the last bytes, which may be the sum
	size int64
}

// Write never fails.
func (s *Sum) Write(data []byte) (int, error) {
	if s.h == nil {
		s.h = sha256.New()
	}
	s.size += int64(len(data))
	s.tail = append(s.tail, data...)
	if n := len(s.tail) - Size; n > 0 {
		s.h.Write(s.tail[:n])
		s.tail = append(s.tail[:0], s.tail[n:]...)
	}
	return len(data), nil
}

// Bytes is how many were written.
func (s *Sum) Bytes() int64 { return s.size }

// Whole reports whether what was written is one whole snapshot, and what was sent.
func (s *Sum) Whole() bool {
	return s.h != nil && s.size > Size && s.size%page == Size%page && bytes.Equal(s.h.Sum(nil), s.tail)
}
