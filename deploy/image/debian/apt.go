package debian

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// A Cache keeps .deb files by their content below Dir, so that clones share them.
type Cache struct {
	Dir string       // made when needed
	Log *slog.Logger // required

	unsigned bool // believe an archive that nobody signed: tests of this package only
}

func (c Cache) trust() string {
	if c.unsigned {
		return "trusted=yes"
	}
	return "signed-by=" + keyring
}

// DefaultCache returns ${BULKHEAD_CACHE:-<the user's cache folder>/bulkhead}/debian.
func DefaultCache() (string, error) {
	if d := os.Getenv("BULKHEAD_CACHE"); d != "" {
		return filepath.Join(d, "debian"), nil
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache folder: %w; set BULKHEAD_CACHE", err)
	}
	return filepath.Join(d, "bulkhead", "debian"), nil
}

// Path returns where the package's .deb is, or will be.
func (c Cache) Path(p Package) string { return filepath.Join(c.Dir, p.SHA256+".deb") }

// Fetch makes sure that every package of the lock is in the cache. It uses the network only if one is missing.
func (c Cache) Fetch(ctx context.Context, l Lock) error {
	var missing []Package
	for _, p := range l.Packages {
		if fi, err := os.Stat(c.Path(p)); err != nil || fi.Size() != p.Size {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	apt, err := c.apt(ctx, l.Suite)
	if err != nil {
		return err
	}
	defer apt.close()
	c.Log.Info("fetch", "packages", len(missing))
	got, err := apt.download(ctx, missing)
	if err != nil {
		return err
	}
	for i, p := range missing {
		if got[i].SHA256 != p.SHA256 {
			return fmt.Errorf("package %s %s: SHA-256 is %s, the lock says %s; the mirror's differs from the one locked: "+
				`"go run ./cmd/mkimage lock" accepts it`, p.Name, p.Version, got[i].SHA256, p.SHA256)
		}
	}
	return nil
}

// Resolve fetches the newest version of each named package and returns a lock of them. A name that is a
// metapackage with a version in its dependency, as linux-image-cloud-amd64, stands for the package it depends on.
func (c Cache) Resolve(ctx context.Context, suite string, names []string) (Lock, error) {
	apt, err := c.apt(ctx, suite)
	if err != nil {
		return Lock{}, err
	}
	defer apt.close()
	l := Lock{Suite: suite}
	for _, name := range names {
		p, err := apt.newest(ctx, name)
		if err != nil {
			return Lock{}, err
		}
		c.Log.Info("resolve", "package", p.Name, "version", p.Version)
		l.Packages = append(l.Packages, p)
	}
	l.Packages, err = apt.download(ctx, l.Packages)
	slices.SortFunc(l.Packages, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return l, err
}

// apt is apt-get with a state folder of its own and indexes just fetched.
type apt struct {
	cache Cache
	conf  string
	work  string // where downloads land
}

func (c Cache) apt(ctx context.Context, suite string) (*apt, error) {
	for tool, pkg := range map[string]string{"apt-get": "apt", "dpkg-deb": "dpkg"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%s is missing: install the package %s", tool, pkg)
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return nil, fmt.Errorf("%s is missing: install the package debian-archive-keyring", keyring)
	}
	mirror, err := Mirror()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(c.Dir, "apt-")
	if err != nil {
		return nil, err
	}
	a := &apt{cache: c, conf: filepath.Join(work, "apt.conf"), work: work}
	if err := a.prepare(ctx, mirror, suite); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

func (a *apt) close() { os.RemoveAll(a.work) }

func (a *apt) prepare(ctx context.Context, mirror, suite string) error {
	lists := filepath.Join(a.cache.Dir, "apt-lists")
	for _, d := range []string{lists + "/partial", a.work + "/cache/archives/partial"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// Read after the host's own configuration, whose proxies we want and whose hooks we do not.
	conf := fmt.Sprintf(`Dir::State %q; Dir::State::status %q; Dir::State::lists %q; Dir::Cache %q;
Dir::Etc::SourceList %q; Dir::Etc::SourceParts "-"; Dir::Etc::Preferences "-"; Dir::Etc::PreferencesParts "-";
APT::Architecture "amd64"; APT::Architectures { "amd64"; }; Acquire::Languages "none"; Acquire::Retries "3";
APT::Sandbox::User "";
#clear APT::Update::Pre-Invoke; #clear APT::Update::Post-Invoke; #clear APT::Update::Post-Invoke-Success;
`, a.work, a.work+"/status", lists, a.work+"/cache", a.work+"/sources.list")
	conf = strings.ReplaceAll(conf, "; #clear", ";\n#clear")
	files := map[string]string{
		"apt.conf": conf, "status": "",
		"sources.list": fmt.Sprintf("deb [%s] %s %s main\n", a.cache.trust(), mirror, suite),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(a.work, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	a.cache.Log.Info("fetch package lists", "suite", suite)
	_, err := a.run(ctx, "apt-get", "update", "--error-on=any")
	return err
}

func (a *apt) run(ctx context.Context, tool string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, tool, append([]string{"-q", "-c", a.conf}, args...)...)
	cmd.Dir = a.work
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

var exactDependency = regexp.MustCompile(`(?m)^Depends: (linux-image-[^ ]+) \(= ([^)]+)\)$`)

// newest returns the name and version of the newest candidate.
func (a *apt) newest(ctx context.Context, name string) (Package, error) {
	out, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return Package{}, err
	}
	if m := exactDependency.FindStringSubmatch(out); m != nil {
		return Package{Name: m[1], Version: m[2]}, nil
	}
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			return Package{Name: name, Version: strings.TrimSpace(v)}, nil
		}
	}
	return Package{}, fmt.Errorf("package %s: no version", name)
}

var gone = regexp.MustCompile(`Version '([^']+)' for '([^']+)' was not found|Unable to locate package (.*)`)

// download fetches packages, which apt verifies, and moves them into the cache. It returns them with what they are.
func (a *apt) download(ctx context.Context, want []Package) ([]Package, error) {
	args := []string{"download"}
	for _, p := range want {
		args = append(args, p.Name+"="+p.Version)
	}
	if _, err := a.run(ctx, "apt-get", args...); err != nil {
		if m := gone.FindStringSubmatch(err.Error()); m != nil {
			return nil, fmt.Errorf(`package %s %s is no longer on the mirror: refresh the lock with "go run ./cmd/mkimage lock"`, m[2]+m[3], m[1])
		}
		return nil, err
	}
	var got []Package
	for _, p := range want {
		debs, err := filepath.Glob(filepath.Join(a.work, p.Name+"_*.deb"))
		if err != nil || len(debs) != 1 {
			return nil, fmt.Errorf("package %s: apt-get download left %d files", p.Name, len(debs))
		}
		if p.SHA256, p.Size, err = sum(debs[0]); err != nil {
			return nil, err
		}
		if err := os.Rename(debs[0], a.cache.Path(p)); err != nil {
			return nil, err
		}
		got = append(got, p)
	}
	return got, nil
}

func sum(path string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}
