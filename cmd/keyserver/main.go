// Keyserver is the reference server of keys.v1.KeyService: encrypted volumes of Bulkhead nodes open by it, as long as they are in its network
// and on its list. It is not part of a node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/bulkhead-os/bulkhead/internal/keyservice"
)

func main() {
	listen := flag.String("listen", ":4050", "address to listen on")
	folder := flag.String("state", "keyserver", "folder for its keys and the list of nodes")
	flag.Usage = func() {
		fmt.Fprint(os.Stderr, "Usage: keyserver [-listen ADDRESS] [-state FOLDER]\n\n"+
			"It prints the pin for Storage.keys. A node that it does not know is refused with its fingerprint: add that to FOLDER/nodes,\n"+
			"one \"sha256:… name\" a line. Keep a copy of FOLDER: without it, volumes open by their other keys only.\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *listen, *folder); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "keyserver:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen, folder string) error {
	s, err := keyservice.Load(folder, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	fmt.Printf("listening on %s\npin: %s\n", l.Addr(), s.Pin())
	return s.Serve(ctx, l)
}
