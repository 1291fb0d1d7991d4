// Command kubeletd is the supervisor of the node's Kubernetes. It is a binary of its own, so that its memory is not the light daemons'.
package main

import (
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/services/kubeletd"
)

func main() { daemon.Main("kubeletd", kubeletd.Run) }
