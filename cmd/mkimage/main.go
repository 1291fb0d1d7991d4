// Command mkimage makes the bootable image: see docs/image.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/image"
	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

const usage = `usage:
  mkimage build [flags]   make the image, if anything that it is made of changed
  mkimage keys --out DIR  make a folder with new keys, to sign images with
  mkimage convert qcow2|iso [DIR]
                          make another form of the image in DIR (default out/image), beside the others
  mkimage fetch           fetch the Debian packages of the lock into the cache
  mkimage lock [FILE]     write a lock of the newest packages (default deploy/image/debian.lock)
  mkimage show [DIR]      print what the image in DIR (default out/image) consists of
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	dir, err := debian.DefaultCache()
	if err != nil {
		return err
	}
	cache := debian.Cache{Dir: dir, Log: log}
	verb, rest := "help", args
	if len(args) > 0 {
		verb, rest = args[0], args[1:]
	}
	arg := func(fallback string) string {
		if len(rest) > 0 {
			return rest[0]
		}
		return fallback
	}
	switch verb {
	case "build":
		return build(ctx, rest, cache, log)
	case "keys":
		return keys(rest)
	case "convert":
		if len(rest) == 0 {
			return fmt.Errorf("want mkimage convert %s", strings.Join(image.Formats(), "|"))
		}
		format := rest[0]
		rest = rest[1:]
		o, err := image.Convert(ctx, filepath.Clean(arg("out/image")), format)
		if err == nil {
			fmt.Printf("%-46s %9.2f MiB  %s\n", o.Name, float64(o.Size)/(1<<20), o.SHA256[:16])
		}
		return err
	case "fetch":
		l, err := image.Lock()
		if err != nil {
			return err
		}
		return cache.Fetch(ctx, l)
	case "lock":
		l, err := image.RefreshLock(ctx, cache)
		if err != nil {
			return err
		}
		return os.WriteFile(arg("deploy/image/debian.lock"), l.Format(), 0o644)
	case "show":
		m, err := image.ReadManifest(arg("out/image"))
		if err == nil {
			fmt.Print(m.Table())
		}
		return err
	}
	fmt.Fprint(os.Stderr, usage)
	return errors.New("want build, keys, convert, fetch, lock or show")
}

// keys makes a set of keys. They are worth what the place is worth where they are kept.
func keys(args []string) error {
	f := flag.NewFlagSet("mkimage keys", flag.ContinueOnError)
	out := f.String("out", "", "`folder` to make; one that is there is not touched")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if *out == "" || f.NArg() > 0 {
		return errors.New("want mkimage keys --out DIR")
	}
	if err := image.MakeKeys(*out, time.Now()); err != nil {
		return err
	}
	fmt.Printf("%s: keys for Secure Boot (PK, KEK, db), the TPM's policy (pcr) and releases (release); keep *.key secret\n", *out)
	return nil
}

func build(ctx context.Context, args []string, cache debian.Cache, log *slog.Logger) error {
	cfg := image.Config{Cache: cache, Log: log}
	f := flag.NewFlagSet("mkimage build", flag.ContinueOnError)
	f.StringVar(&cfg.Bin, "bin", "out/bin", "`folder` of our binaries")
	f.StringVar(&cfg.Kubernetes, "kubernetes", "", "`folder` of the Kubernetes set, or \"none\"")
	f.StringVar(&cfg.Out, "out", "out/image", "`folder` of the image, replaced as a whole")
	f.StringVar(&cfg.Version, "version", "0.1.0-dev", "`version` of the image")
	f.StringVar(&cfg.Minimum, "minimum", "", "oldest `version` that may be upgraded to this one")
	f.IntVar(&cfg.Epoch, "epoch", 1, "`number` from 1 to 63; a node that has run a higher one does not open its disk for this image")
	folder := f.String("keys", "out/keys", "`folder` of the keys to sign with, made by mkimage keys")
	f.StringVar(&cfg.ClaimKey, "claim-key", "", "`file` with a claim key that becomes part of the image")
	f.IntVar(&cfg.Level, "level", 9, "`level` of compression, 1 to 22")
	f.StringVar(&cfg.Append, "append", "", "`words` at the end of the kernel command line, in a test's image: they may take protection away")
	f.Func("program", "`file` of one more program for /usr/lib/bulkhead, in a test's image; may be given more than once", func(s string) error {
		cfg.Programs = append(cfg.Programs, s)
		return nil
	})
	f.BoolVar(&cfg.AllowMissing, "allow-missing", false, "build without the binaries that do not exist")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected %q", f.Arg(0))
	}
	if cfg.Kubernetes == "" {
		return errors.New("--kubernetes FOLDER or --kubernetes none is required")
	}
	cfg.Out = filepath.Clean(cfg.Out)
	var err error
	if cfg.Keys, err = image.LoadKeys(*folder); err != nil {
		return err
	}
	m, built, err := image.Build(ctx, cfg)
	if err != nil {
		return err
	}
	if built {
		fmt.Print(m.Table())
	} else {
		fmt.Printf("%s: up to date (Bulkhead %s, root %.16s)\n", cfg.Out, m.Version, m.RootHash)
	}
	return nil
}
