// Package version says which build this is. It must import nothing.
package version

// Version is Bulkhead's; the image build sets it: -ldflags "-X github.com/bulkhead-os/bulkhead/internal/version.Version=v0.1.0".
var Version = "v0.1.0-dev"

// Kubernetes is the version of Kubernetes in the image; deploy/kubernetes/go.mod is where it comes from, and a test keeps them equal.
const Kubernetes = "v1.37.2"
