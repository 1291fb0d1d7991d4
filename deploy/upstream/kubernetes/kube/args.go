package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
)

// argsVariable names a file with one flag per line. A node's units have fixed
// command lines; what is different from node to node comes from such a file.
const argsVariable = "KUBE_ARGS_FILE"

// maxArgs bounds the file, in bytes.
const maxArgs = 64 << 10

// withFile returns argv with the flags of a file appended; a path of "" adds
// nothing. Empty lines are skipped; there are no comments and no quotes. A line
// that is no flag is an error, so that a damaged file starts nothing.
func withFile(argv []string, path string) ([]string, error) {
	if path == "" {
		return argv, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxArgs+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxArgs {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxArgs)
	}
	out := append([]string{}, argv...)
	for i, line := range bytes.Split(data, []byte("\n")) {
		flag := string(line)
		if flag == "" {
			continue
		}
		if name, _, _ := strings.Cut(flag, "="); len(name) < 3 || !strings.HasPrefix(name, "--") || strings.ContainsAny(flag, "\r\x00") {
			return nil, fmt.Errorf("%s:%d: %q is no flag like --name=value", path, i+1, flag)
		}
		out = append(out, flag)
	}
	return out, nil
}
