package main

import "net"

// Something else has etcd's port: the member starts again and again, and never serves.
func init() {
	_, _ = net.Listen("tcp", "127.0.0.1:2379")
}
