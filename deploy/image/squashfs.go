package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"
)

// epoch is the time of every file and of every file system of the image: it is the content that tells builds apart.
var epoch = time.Unix(1735689600, 0).UTC() // 2025-01-01

// writeTar writes the tree as a tar archive, owned by root, all times the same.
func writeTar(w io.Writer, t Tree) error {
	buf := bufio.NewWriterSize(w, 1<<20)
	tw := tar.NewWriter(buf)
	for _, e := range t {
		if err := writeEntry(tw, e); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return buf.Flush()
}

func writeEntry(tw *tar.Writer, e Entry) error {
	h := &tar.Header{Name: "." + e.Path, Mode: int64(e.Mode.Perm()), ModTime: epoch, Format: tar.FormatPAX}
	var content io.Reader = bytes.NewReader(e.Data)
	switch e.Mode.Type() {
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, strings.TrimSuffix(h.Name, "/")+"/"
	case fs.ModeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(len(e.Data))
		if e.Host == "" {
			break
		}
		f, err := os.Open(e.Host)
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		h.Size, content = fi.Size(), f
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(tw, content)
	return err
}

// makeSquashfs packs the tree into a squashfs with zstd. Equal trees give equal bytes (for one version of mksquashfs).
func makeSquashfs(ctx context.Context, t Tree, out string, level int) error {
	if _, err := exec.LookPath("mksquashfs"); err != nil {
		return fmt.Errorf("mksquashfs is missing: install the package squashfs-tools (4.5 or newer)")
	}
	os.Remove(out)
	cmd := exec.CommandContext(ctx, "mksquashfs", "-", out, "-tar", "-comp", "zstd", "-Xcompression-level", fmt.Sprint(level),
		"-b", "128K", "-noappend", "-no-xattrs", "-all-root", "-root-mode", "0755", "-all-time", fmt.Sprint(epoch.Unix()), "-mkfs-time", fmt.Sprint(epoch.Unix()),
		"-processors", "2", "-no-progress", "-quiet")
	for _, v := range os.Environ() { // mksquashfs refuses times from both sides
		if !strings.HasPrefix(v, "SOURCE_DATE_EPOCH=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &errs, &errs
	if err := cmd.Start(); err != nil {
		return err
	}
	werr := writeTar(in, t)
	in.Close()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("mksquashfs: %w: %s", err, bytes.TrimSpace(errs.Bytes()))
	}
	return werr
}
