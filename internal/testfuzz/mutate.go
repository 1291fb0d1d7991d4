package testfuzz

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
)

// A mutator makes inputs of seeds.
type mutator struct {
	*rand.Rand
	texts [][]byte // of all seeds of the target
}

// input changes one argument of a seed, or more.
func (m mutator) input(seed []reflect.Value) []reflect.Value {
	out := clone(seed)
	sure := m.IntN(len(out))
	for i, v := range out {
		if i == sure || m.IntN(3) == 0 {
			out[i] = m.value(v)
		}
	}
	return out
}

func (m mutator) value(v reflect.Value) reflect.Value {
	changed := reflect.New(v.Type()).Elem()
	switch v.Kind() {
	case reflect.Slice:
		changed.SetBytes(m.bytes(v.Bytes()))
	case reflect.String:
		changed.SetString(string(m.bytes([]byte(v.String()))))
	case reflect.Bool:
		changed.SetBool(!v.Bool())
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		changed.SetInt(int64(m.number(uint64(v.Int()))) << (64 - v.Type().Bits()) >> (64 - v.Type().Bits()))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		changed.SetUint(m.number(v.Uint()) << (64 - v.Type().Bits()) >> (64 - v.Type().Bits()))
	default:
		panic(fmt.Sprintf("no target had a %s yet: say here what to make of one", v.Type()))
	}
	return changed
}

// edges are where counts, sizes and offsets go wrong.
var edges = []uint64{0, 1, 7, 8, 127, 128, 255, 256, 511, 512, 4096, math.MaxInt16, 1 << 15, math.MaxUint16, 1 << 16, math.MaxInt32, 1 << 31, math.MaxUint32, 1 << 32,
	math.MaxInt64, 1 << 63, math.MaxUint64, math.MaxUint64 - 7}

func (m mutator) number(n uint64) uint64 {
	switch m.IntN(4) {
	case 0:
		return n + uint64(m.IntN(17)) - 8
	case 1:
		return n ^ 1<<m.IntN(64)
	case 2:
		return edges[m.IntN(len(edges))]
	default:
		return m.Uint64() >> m.IntN(64)
	}
}

// words are those that parsers of texts have trouble with.
var words = []string{"\x00", "\xff", "\xc3\x28", "\u202e", "-1", "0", "18446744073709551616", "9223372036854775807", "1e999", "\"", "\\", "\n", "\r\n", " ", "/", "../", "%00", "{}", "[]",
	"[[[[[[[[[[[[[[[[", "null", ":", ",", "=", ".", "~", "&a [*a]", "0x", "é"}

// bytes makes another text of one. It does not grow without end.
func (m mutator) bytes(b []byte) []byte {
	most := 2*len(b) + 4096
	if m.IntN(10) == 0 {
		b = make([]byte, m.IntN(1<<m.IntN(10)+1))
		m.fill(b)
	}
	for changes := 1 + m.IntN(1<<m.IntN(4)); changes > 0; changes-- {
		b = m.change(b)
	}
	return b[:min(len(b), most)]
}

func (m mutator) fill(b []byte) {
	for i := range b {
		b[i] = byte(m.Uint32())
	}
}

// part is some of a text, more often a short one.
func (m mutator) part(b []byte) (from, to int) {
	from = m.IntN(len(b) + 1)
	return from, min(len(b), from+1+m.IntN(1<<m.IntN(8)))
}

func (m mutator) change(b []byte) []byte {
	from, to := m.part(b)
	switch m.IntN(10) {
	case 0:
		return slices.Delete(b, from, to)
	case 1:
		return b[:from]
	case 2: // the same twice, or often
		return slices.Insert(b, from, slices.Repeat(slices.Clone(b[from:to]), 1+m.IntN(4))...)
	case 3:
		return slices.Insert(b, from, []byte(words[m.IntN(len(words))])...)
	case 4:
		return slices.Replace(b, from, to, []byte(words[m.IntN(len(words))])...)
	case 5: // a piece of another seed
		if len(m.texts) > 0 {
			other := m.texts[m.IntN(len(m.texts))]
			a, z := m.part(other)
			return slices.Replace(b, from, to, other[a:z]...)
		}
	case 6: // a number, in either order of bytes
		for _, size := range []int{8, 4, 2}[m.IntN(3):] {
			if from+size <= len(b) {
				n := make([]byte, 8)
				if m.IntN(2) == 0 {
					binary.LittleEndian.PutUint64(n, m.number(0))
					copy(b[from:], n[:size])
				} else {
					binary.BigEndian.PutUint64(n, m.number(0))
					copy(b[from:], n[8-size:])
				}
				return b
			}
		}
	case 7:
		m.fill(b[from:to])
		return b
	}
	if from < to {
		b[from] ^= 1 << m.IntN(8)
	}
	return b
}
