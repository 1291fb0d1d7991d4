// Command etcdd is the node's etcd member. It is a binary of its own, so that no other process pays for etcd's dependencies.
package main

import (
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/services/etcdd"
)

func main() { daemon.Main("etcdd", etcdd.Run) }
