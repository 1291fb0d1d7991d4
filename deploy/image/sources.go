package image

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

// binaries are ours, by their file names in Config.Bin.
var binaries = []string{"init", "bulkheadd", "etcdd", "kubeletd"}

// kubernetesSet is what the folder Config.Kubernetes must hold, besides CNI plugins.
var kubernetesSet = []string{"bin/containerd", "bin/containerd-shim-runc-v2", "bin/ctr", "bin/kube", "bin/runc", "images.tar"}

// sources are the files on the host that an image is made of.
type sources struct {
	lock      debian.Lock
	bin, kube map[string]string
	claimKey  string
	missing   []string
}

func gather(cfg Config) (s sources, err error) {
	if s.lock, err = Lock(); err != nil {
		return s, err
	}
	s.bin, s.kube = map[string]string{}, map[string]string{}
	for _, name := range binaries {
		if file := filepath.Join(cfg.Bin, name); isFile(file) {
			s.bin[name] = file
		} else {
			s.missing = append(s.missing, file)
		}
	}
	for _, file := range cfg.Programs {
		if !isFile(file) {
			return s, fmt.Errorf("program %s is no file", file)
		}
		s.bin[filepath.Base(file)] = file
	}
	if cfg.Kubernetes != "none" {
		for _, name := range kubernetesSet {
			if file := filepath.Join(cfg.Kubernetes, name); isFile(file) {
				s.kube[name] = file
			} else {
				s.missing = append(s.missing, file)
			}
		}
		plugins, err := filepath.Glob(filepath.Join(cfg.Kubernetes, "cni", "*"))
		if err != nil {
			return s, err
		}
		if len(plugins) == 0 {
			s.missing = append(s.missing, filepath.Join(cfg.Kubernetes, "cni/*"))
		}
		for _, file := range plugins {
			s.kube["cni/"+filepath.Base(file)] = file
		}
	}
	if len(s.missing) > 0 && !cfg.AllowMissing {
		return s, fmt.Errorf("missing: %s (\"make build\" makes them; --kubernetes none and --allow-missing do without)", strings.Join(s.missing, ", "))
	}
	s.claimKey = cfg.ClaimKey
	return s, nil
}

func isFile(name string) bool {
	fi, err := os.Stat(name)
	return err == nil && fi.Mode().IsRegular()
}

func (s sources) stamp(cfg Config) (stamp, error) {
	files := map[string]string{}
	for name, file := range s.bin {
		files["bin/"+name] = file
	}
	for name, file := range s.kube {
		files["kubernetes/"+name] = file
	}
	if s.claimKey != "" {
		files["claim-key"] = s.claimKey
	}
	self, err := os.Executable()
	if err != nil {
		return stamp{}, err
	}
	files["mkimage"] = self
	tool, _ := exec.Command("mksquashfs", "-version").Output()
	first, _, _ := strings.Cut(string(tool), "\n")
	texts := []string{cfg.Version, cfg.Minimum, cfg.Append, fmt.Sprint(cfg.Epoch, " ", cfg.Level), string(lockText), first}
	public, err := cfg.Keys.texts()
	if err != nil {
		return stamp{}, err
	}
	for _, name := range slices.Sorted(maps.Keys(public)) {
		texts = append(texts, string(public[name]))
	}
	return newStamp(readStamp(cfg.Out), texts, files)
}
