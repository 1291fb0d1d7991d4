package config

import (
	"fmt"
	"math"
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

// String writes a size so that ParseSize reads it; a size that is no whole number of KiB is written in bytes, and cannot be read.
func (s Size) String() string {
	for _, u := range units {
		if s != 0 && s%(1<<u.shift) == 0 {
			return strconv.FormatUint(uint64(s>>u.shift), 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}
