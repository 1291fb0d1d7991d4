package config

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// units of sizes, greatest first, so that String finds the shortest form.
var units = []struct {
	name  string
	shift uint
}{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}}

// ParseSize reads a size like "256MiB": a whole number and KiB, MiB, GiB or TiB.
func ParseSize(s string) (Size, error) {
	for _, u := range units {
		if digits, ok := strings.CutSuffix(s, u.name); ok {
			n, err := strconv.ParseUint(digits, 10, 64)
			if err == nil && digits[0] != '+' && n <= math.MaxInt64>>u.shift {
				return Size(n << u.shift), nil
			}
		}
	}
	return 0, fmt.Errorf("%q is not a size like \"256MiB\" (KiB, MiB, GiB or TiB)", s)
}

// A Comparison is one condition on a size.
type Comparison struct {
	Op   string // "<", "<=", "=", ">=" or ">"
	Size Size
}

// ParseComparisons reads one or two comparisons that must both hold: ">= 100GiB, < 2TiB".
func ParseComparisons(s string) ([]Comparison, error) {
	bad := fmt.Errorf("%q is not a comparison like \">= 100GiB\" or \"> 100GiB, < 2TiB\"", s)
	var out []Comparison
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		c := Comparison{Op: part[:len(part)-len(strings.TrimLeft(part, "<=>"))]}
		size, err := ParseSize(strings.TrimSpace(part[len(c.Op):]))
		if !slices.Contains([]string{"<", "<=", "=", ">=", ">"}, c.Op) || err != nil || len(out) == 2 {
			return nil, bad
		}
		c.Size = size
		out = append(out, c)
	}
	return out, nil
}

// Holds reports whether a number of bytes fits.
func (c Comparison) Holds(n uint64) bool {
	switch c.Op {
	case "<":
		return n < uint64(c.Size)
	case "<=":
		return n <= uint64(c.Size)
	case ">=":
		return n >= uint64(c.Size)
	case ">":
		return n > uint64(c.Size)
	}
	return n == uint64(c.Size)
}

// String writes a size so that ParseSize reads it; a size that is no whole number of KiB is written in bytes, and cannot be read.
func (s Size) String() string {
	for _, u := range units {
		if s != 0 && s%(1<<u.shift) == 0 {
			return strconv.FormatUint(uint64(s>>u.shift), 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}
