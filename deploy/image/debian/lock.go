// Package debian obtains exactly the Debian packages that a lock file names, and reads the files in them.
//
// It trusts apt for signatures and checks the lock's SHA-256 itself. It runs apt-get with a private state folder and
// changes nothing on the host. It knows nothing of what the packages are for.
package debian

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A Lock names every package to the byte. Packages are in the order of their names.
type Lock struct {
	Suite    string // "trixie"
	Packages []Package
}

// A Package is one line of a lock.
type Package struct {
	Name, Version string
	SHA256        string // 64 small hexadecimal digits, of the .deb
	Size          int64  // of the .deb, in bytes
}

const lockHead = `# The Debian packages of the image. Made by "go run ./cmd/mkimage lock"; do not edit.
`

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	versionForm = regexp.MustCompile(`^[0-9][A-Za-z0-9.+:~-]*$`)
	suiteForm   = regexp.MustCompile(`^[a-z][a-z0-9-]*$`)
)

// Format returns the lock as text; ParseLock is its inverse.
func (l Lock) Format() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%ssuite %s\n", lockHead, l.Suite)
	for _, p := range l.Packages {
		fmt.Fprintf(&b, "%s %s %d %s\n", p.Name, p.Version, p.Size, p.SHA256)
	}
	return b.Bytes()
}

// ParseLock reads a lock file's text. Errors name the line.
func ParseLock(text []byte) (Lock, error) {
	var l Lock
	n := 0
	for sc := bufio.NewScanner(bytes.NewReader(text)); sc.Scan(); {
		n++
		f := strings.Fields(sc.Text())
		switch {
		case len(f) == 0 || f[0][0] == '#':
		case len(f) == 2 && f[0] == "suite" && l.Suite == "" && suiteForm.MatchString(f[1]):
			l.Suite = f[1]
		case len(f) == 4 && l.Suite != "":
			p := Package{Name: f[0], Version: f[1], SHA256: f[3]}
			var err error
			if p.Size, err = strconv.ParseInt(f[2], 10, 64); err != nil || p.Size <= 0 {
				return Lock{}, fmt.Errorf("line %d: size %q is not a positive number", n, f[2])
			}
			if sum, err := hex.DecodeString(p.SHA256); err != nil || len(sum) != 32 || strings.ToLower(p.SHA256) != p.SHA256 {
				return Lock{}, fmt.Errorf("line %d: %q is not a SHA-256", n, p.SHA256)
			}
			if !nameForm.MatchString(p.Name) || !versionForm.MatchString(p.Version) {
				return Lock{}, fmt.Errorf("line %d: %q %q is not a package name and version", n, p.Name, p.Version)
			}
			if len(l.Packages) > 0 && l.Packages[len(l.Packages)-1].Name >= p.Name {
				return Lock{}, fmt.Errorf("line %d: %q is not in order", n, p.Name)
			}
			l.Packages = append(l.Packages, p)
		default:
			return Lock{}, fmt.Errorf(`line %d: want "suite NAME" once and then "PACKAGE VERSION SIZE SHA256"`, n)
		}
	}
	if l.Suite == "" {
		return Lock{}, fmt.Errorf("no suite")
	}
	return l, nil
}

// Find returns the package of that name.
func (l Lock) Find(name string) (Package, bool) {
	i := slices.IndexFunc(l.Packages, func(p Package) bool { return p.Name == name })
	if i < 0 {
		return Package{}, false
	}
	return l.Packages[i], true
}
