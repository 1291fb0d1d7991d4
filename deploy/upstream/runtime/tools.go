//go:build tools

// Package runtime pins what deploy/build-kubernetes.sh builds from other
// people's modules. The tag is never set: the imports exist for go mod tidy.
package runtime

import (
	_ "github.com/containerd/containerd/v2/cmd/containerd"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	_ "github.com/containerd/containerd/v2/cmd/ctr"
	_ "github.com/containernetworking/plugins/plugins/ipam/host-local"
	_ "github.com/containernetworking/plugins/plugins/main/bridge"
	_ "github.com/containernetworking/plugins/plugins/main/loopback"
	_ "github.com/containernetworking/plugins/plugins/meta/portmap"
	_ "github.com/google/go-containerregistry/pkg/v1/layout"
	_ "github.com/opencontainers/runc"
)
