package slots

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

// Where kernels are on the EFI partition, and what a kernel is called that is not to be started yet: systemd-boot takes only names
// that end in .efi.
const (
	kernelDir  = "EFI/Linux"
	prefix     = "bulkhead_"
	suffix     = ".efi"
	tempName   = "bulkhead.next"
	firstTries = 3
)

// A Name is that of a kernel of ours: bulkhead_<sequence>_<version>[+<left>[-<done>]].efi. systemd-boot starts the highest sequence that
// has tries left, and counts the tries in the name.
type Name struct {
	Sequence int // 1 and up; grows with every upgrade and rollback
	Version  string
	// Counted is true until the kernel was found good. Left and Done are 0 without it.
	Counted    bool
	Left, Done int
}

// ParseName reads a file's name; ok is false if it is not one of ours.
func ParseName(file string) (n Name, ok bool) {
	rest, ok := strings.CutPrefix(file, prefix)
	if ok {
		rest, ok = strings.CutSuffix(rest, suffix)
	}
	if !ok {
		return Name{}, false
	}
	rest, counter, counted := strings.Cut(rest, "+")
	sequence, version, _ := strings.Cut(rest, "_")
	n = Name{Version: version, Counted: counted}
	n.Sequence, ok = number(sequence)
	if counted {
		left, done, has := strings.Cut(counter, "-")
		var fine bool
		n.Left, fine = number(left)
		ok = ok && fine
		if has {
			n.Done, fine = number(done)
			ok = ok && fine
		}
	}
	return n, ok && n.Sequence > 0 && bundle.ValidVersion(version)
}

func number(s string) (int, bool) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err == nil && s[0] != '+'
}

// String returns the file's name.
func (n Name) String() string {
	s := fmt.Sprintf("%s%04d_%s", prefix, n.Sequence, n.Version)
	if n.Counted {
		s += fmt.Sprintf("+%d", n.Left)
		if n.Done > 0 {
			s += fmt.Sprintf("-%d", n.Done)
		}
	}
	return s + suffix
}

// good returns the name of a kernel that was found good.
func (n Name) good() Name { return Name{Sequence: n.Sequence, Version: n.Version} }

// givenUpTries is more than anybody tries: so a kernel that a rollback gave up can be told from one that runs its last try.
const givenUpTries = 9

// givenUp returns the name of a kernel that is not to be tried any more.
func (n Name) givenUp() Name {
	return Name{Sequence: n.Sequence, Version: n.Version, Counted: true, Done: givenUpTries}
}

// GivenUp reports whether a rollback gave the kernel up.
func (n Name) GivenUp() bool { return n.Counted && n.Left == 0 && n.Done >= givenUpTries }

// trial returns the name of a kernel that is to be tried, under another sequence.
func (n Name) trial(sequence int) Name {
	return Name{Sequence: sequence, Version: n.Version, Counted: true, Left: firstTries}
}

// Order sorts names of files as systemd-boot does for kernels that say nothing of their version: first those that have tries left or need
// none, then the higher name, as versions are compared.
func Order(files []string) {
	slices.SortStableFunc(files, func(a, b string) int {
		return cmp.Or(cmp.Compare(exhausted(a), exhausted(b)), -compareNames(a, b))
	})
}

// exhausted is 1 for names whose tries are used up. It reads any file's name, as systemd-boot does.
func exhausted(file string) int {
	rest, _ := strings.CutSuffix(file, suffix)
	at := strings.LastIndexByte(rest, '+')
	left, done, has := strings.Cut(rest[at+1:], "-")
	l, ok := number(left)
	if has {
		_, fine := number(done)
		ok = ok && fine
	}
	if at >= 0 && ok && l == 0 {
		return 1
	}
	return 0
}

// compareNames is the comparison of versions of the UAPI group (UAPI.10) that systemd-boot orders names by: parts of letters or digits,
// digits by their value; "~", "-", "^" and "." before a part make it older, in this order; other characters only part.
func compareNames(a, b string) int {
	const marks = "~-^."
	for {
		a, b = strings.TrimLeftFunc(a, separates), strings.TrimLeftFunc(b, separates)
		if x, y := strings.HasPrefix(a, "~"), strings.HasPrefix(b, "~"); x != y {
			return yes(y) - yes(x)
		}
		if a == "" || b == "" {
			return cmp.Compare(len(a), len(b))
		}
		marked := false
		for _, m := range marks {
			x, y := strings.HasPrefix(a, string(m)), strings.HasPrefix(b, string(m))
			if x != y {
				return yes(y) - yes(x)
			}
			if x {
				a, b, marked = a[1:], b[1:], true
				break
			}
		}
		if marked {
			continue
		}
		in := isDigit
		if !isDigit(a[0]) && !isDigit(b[0]) {
			in = isLetter
		}
		x, y := span(a, in), span(b, in)
		a, b = a[len(x):], b[len(y):]
		if in('0') {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		}
		if c := cmp.Compare(x, y); c != 0 {
			return c
		}
	}
}

func separates(r rune) bool {
	return r > 0x7f || !isDigit(byte(r)) && !isLetter(byte(r)) && !strings.ContainsRune("~-^.", r)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// span returns the longest start of s whose characters are in a class.
func span(s string, in func(byte) bool) string {
	for i := range len(s) {
		if !in(s[i]) {
			return s[:i]
		}
	}
	return s
}

func yes(b bool) int {
	if b {
		return 1
	}
	return 0
}
