// Command twin is what TestHost has in place of a daemon: static as these are, so that it needs no other file to be started.
package main

import (
	"encoding/json"
	"os"

	"github.com/bulkhead-os/bulkhead/test/twin"
)

func main() {
	if err := json.NewEncoder(os.Stdout).Encode(twin.Try(os.Getenv("BULKHEAD_UNIT"), os.Args[1:]...)); err != nil {
		panic(err)
	}
}
