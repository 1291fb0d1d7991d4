// Command containerd is up, and does nothing: the kubelet has no runtime.
package main

import "time"

func main() {
	for {
		time.Sleep(time.Hour)
	}
}
