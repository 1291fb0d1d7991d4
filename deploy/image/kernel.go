package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

// A kernel is what the image takes from Debian's kernel package.
type kernel struct {
	release             string
	vmlinuz             []byte
	stage1, early, late []module
}

func readKernel(ctx context.Context, files debian.Files) (kernel, error) {
	var k kernel
	for name, f := range files {
		if r, ok := strings.CutPrefix(name, "/boot/vmlinuz-"); ok {
			if k.release != "" {
				return k, errors.New("the lock names two kernels")
			}
			k.release, k.vmlinuz = r, f.Data
		}
	}
	if k.release == "" {
		return k, errors.New("the lock names no kernel")
	}
	set := moduleIndex(ctx, files, k.release)
	var err error
	if k.stage1, err = set.order(stage1, nil); err != nil {
		return k, err
	}
	if k.early, err = set.order(stage2.early, names(k.stage1)); err != nil {
		return k, err
	}
	k.late, err = set.order(stage2.late, names(k.stage1, k.early))
	return k, err
}

func names(lists ...[]module) map[string]bool {
	out := map[string]bool{}
	for _, m := range slices.Concat(lists...) {
		out[m.name] = true
	}
	return out
}

// moduleIndex finds the release's modules among the files. Each is unpacked only when asked for.
func moduleIndex(ctx context.Context, files debian.Files, release string) moduleSet {
	dir := "/usr/lib/modules/" + release + "/"
	byName := map[string]string{}
	for name := range files {
		if rel, ok := strings.CutPrefix(name, dir); ok && strings.Contains(path.Base(rel), ".ko") {
			byName[moduleName(rel)] = rel
		}
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(files[dir+"modules.builtin"].Data)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}
	load := func(name string) (module, bool, error) {
		rel, ok := byName[name]
		if !ok {
			return module{}, false, nil
		}
		data := files[dir+rel].Data
		plain, packed := strings.CutSuffix(rel, ".xz")
		if packed {
			var err error
			if data, err = unxz(ctx, data); err != nil {
				return module{}, false, err
			}
		}
		told, depends, err := modinfo(data)
		if err == nil && told != name {
			err = fmt.Errorf("its .modinfo calls it %q", told)
		}
		return module{name, plain, depends, data}, true, err
	}
	return moduleSet{load, builtin}
}

func unxz(ctx context.Context, data []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "xz", "--decompress", "--stdout")
	cmd.Stdin = bytes.NewReader(data)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("xz is missing: install the package xz-utils")
	} else if err != nil {
		return nil, fmt.Errorf("xz: %w: %s", err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}

// initramfsTree plans the initramfs: PID 1, the modules of stage 1, and their list. Pure.
func initramfsTree(init string, modules []module) (Tree, error) {
	b := newBuilder()
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		b.dir(d, 0o755)
	}
	if init != "" {
		b.host("/init", 0o755, init, "bulkhead")
	}
	var list, bare strings.Builder
	for _, m := range modules {
		name := "/modules/" + path.Base(m.path)
		b.file(name, 0o644, m.data, "kernel")
		part := &list
		if withoutUEFI[m.name] {
			part = &bare
		}
		fmt.Fprintln(part, strings.TrimSpace(name+" "+moduleParams[m.name]))
	}
	b.file("/modules.list", 0o644, []byte(list.String()+"\n"+bare.String()), "mkimage")
	return b.tree()
}
