// Package mounts reads the table of mounts.
package mounts

import (
	"os"
	"strings"
)

// A Mount is a line of /proc/self/mountinfo.
type Mount struct{ Point, FS, Source string }

// Read returns the mounts that this thread sees, in the order in which they were made.
func Read() ([]Mount, error) {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	return parse(string(text)), err
}

// parse skips lines that are not as proc_pid_mountinfo(5) says.
func parse(text string) (all []Mount) {
	for line := range strings.Lines(text) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if ok && len(l) >= 6 && len(r) >= 2 {
			all = append(all, Mount{unescape(l[4]), r[0], unescape(r[1])})
		}
	}
	return all
}

// unescape undoes the octal escapes of blanks and backslashes.
func unescape(s string) string {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			out = append(out, (s[i+1]-'0')<<6|(s[i+2]-'0')<<3|(s[i+3]-'0'))
			i += 3
		} else {
			out = append(out, s[i])
		}
	}
	return string(out)
}

// Under says whether path is dir or lies in it.
func Under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}
