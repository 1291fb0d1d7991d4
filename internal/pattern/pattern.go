// Package pattern has regular expressions that are compiled when they are needed first: all light daemons are one program, and what one
// of them compiles at its start is memory of each.
package pattern

import (
	"regexp"
	"sync"
)

// Lazy returns a function that compiles expr when it is called first, and returns the same afterwards. Like regexp.MustCompile, that
// call panics if expr is wrong. Any number of goroutines may call it.
func Lazy(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}
