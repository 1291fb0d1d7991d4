// Package version says which build this is. It must import nothing of ours.
package version

import "time"

// Version is Bulkhead's; the image build sets it: -ldflags "-X github.com/bulkhead-os/bulkhead/internal/version.Version=v0.1.0".
var Version = "v0.1.0-dev"

// Built is when, as RFC 3339 has it: the time of the commit, so that two builds are the same; the image build sets it as Version. "" means that it is not known.
var Built = ""

// BuildTime is Built; zero if that is not known.
func BuildTime() time.Time {
	t, err := time.Parse(time.RFC3339, Built)
	if err != nil {
		return time.Time{}
	}
	return t
}

// Kubernetes is the version of Kubernetes in the image; deploy/upstream/kubernetes/go.mod is where it comes from, and a test keeps them equal.
const Kubernetes = "v1.37.2"
