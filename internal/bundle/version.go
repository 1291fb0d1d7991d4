package bundle

import (
	"cmp"
	"strconv"
	"strings"
)

// ValidVersion reports whether a text is a version as images have it: MAJOR.MINOR.PATCH, and perhaps "-" and words of letters and
// digits with dots or dashes between them; at most 64 characters. A version is part of a file's name in the EFI partition, which
// is why there is no "+", and no "_".
func ValidVersion(s string) bool {
	core, pre, has := strings.Cut(s, "-")
	numbers := strings.Split(core, ".")
	if len(s) > maxName || len(numbers) != 3 {
		return false
	}
	for _, n := range numbers {
		if _, err := strconv.ParseUint(n, 10, 31); err != nil || n[0] == '+' || len(n) > 1 && n[0] == '0' {
			return false
		}
	}
	if !has {
		return true
	}
	for word := range strings.SplitSeq(pre, ".") {
		if word == "" {
			return false
		}
		for i := range len(word) {
			if c := word[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' {
				return false
			}
		}
	}
	return true
}

// CompareVersions returns -1, 0 or 1 as a comes before, with or after b, by the order of Semantic Versioning 2.0: 1.2.3-rc.1 comes
// before 1.2.3. Both must be valid.
func CompareVersions(a, b string) int {
	coreA, preA, _ := strings.Cut(a, "-")
	coreB, preB, _ := strings.Cut(b, "-")
	if c := compareWords(coreA, coreB); c != 0 {
		return c
	}
	switch {
	case preA == preB:
		return 0
	case preA == "":
		return 1
	case preB == "":
		return -1
	}
	return compareWords(preA, preB)
}

// compareWords compares words between dots: numbers by value and before words, words by their letters; then fewer come first.
func compareWords(a, b string) int {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		x, y := as[i], bs[i]
		nx, errX := strconv.ParseUint(x, 10, 64)
		ny, errY := strconv.ParseUint(y, 10, 64)
		c := 0
		switch {
		case errX == nil && errY == nil:
			c = cmp.Compare(nx, ny)
		case errX == nil:
			c = -1
		case errY == nil:
			c = 1
		default:
			c = cmp.Compare(x, y)
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(len(as), len(bs))
}
