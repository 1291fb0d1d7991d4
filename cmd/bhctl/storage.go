package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
)

// unlockTime is longer than a slow machine takes to make a key out of a passphrase.
const unlockTime = 3 * time.Minute

func (a *app) unlockCmd() *cobra.Command {
	var passphrase bool
	c := &cobra.Command{Use: "unlock [ENDPOINT]", Short: "Open a node's locked volumes with its recovery key", Args: cobra.MaximumNArgs(1),
		Long: "Open a node's locked volumes with its recovery key, or with --passphrase. The key is asked for, or read from standard input; it is sent only\n" +
			"to a node that has shown that it knows it. No credentials are needed while STATE is locked: the node does not know anybody.",
		Example: "  bhctl unlock 192.0.2.10\n  bhctl unlock < recovery-key",
		RunE: func(cmd *cobra.Command, args []string) error {
			var cred client.Credentials
			endpoint := ""
			if len(args) > 0 {
				endpoint = args[0]
			}
			t, err := a.target()
			switch {
			case err != nil && endpoint == "":
				return err
			case err == nil && endpoint == "" && len(t.all()) > 1:
				return fmt.Errorf("which node? The context has several endpoints: bhctl unlock ENDPOINT, one of %s, or another address of the locked node", strings.Join(t.all(), ", "))
			case err == nil && (endpoint == "" || slices.Contains(t.all(), endpoint)):
				endpoint, cred = cmp.Or(endpoint, t.Endpoint), t.credentials()
			}
			kind := unlock.Recovery
			if passphrase {
				kind = unlock.Passphrase
			}
			key, err := a.secret(kind)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), max(a.timeout, unlockTime))
			defer cancel()
			volumes, err := client.Unlock(ctx, endpoint, kind, key, cred)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "unlocked %s\n", strings.Join(volumes, " and "))
			return nil
		}}
	c.Flags().BoolVar(&passphrase, "passphrase", false, "with a passphrase instead of the recovery key")
	return c
}

// secret asks for a key without showing it; if standard input is no terminal, its first line is the key.
func (a *app) secret(what string) (string, error) {
	if f, ok := a.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprintf(a.err, "%s: ", strings.ToUpper(what[:1])+what[1:])
		b, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(a.err)
		return strings.TrimRight(string(b), "\r\n"), err
	}
	line, err := bufio.NewReader(io.LimitReader(a.in, 4<<10)).ReadString('\n')
	if errors.Is(err, io.EOF) && line != "" {
		err = nil
	}
	if err != nil {
		return "", fmt.Errorf("standard input: no %s: %w", what, err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func (a *app) storageCmd() *cobra.Command {
	c := &cobra.Command{Use: "storage", Short: "Keys of encrypted volumes"}
	keys := &cobra.Command{Use: "keys", Short: "What opens the encrypted volumes"}
	keys.AddCommand(a.keysListCmd(), a.keysAddCmd(), a.keysRemoveCmd(), a.keysRotateCmd(), a.keysRecoveryCmd())
	c.AddCommand(keys)
	return c
}

// keys calls the service, with time enough for argon2id on slow machines.
func (a *app) keys(ctx context.Context, f func(context.Context, storagev1.KeysClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, max(a.timeout, unlockTime))
	defer cancel()
	return a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error { return f(ctx, storagev1.NewKeysClient(conn)) })
}

func (a *app) keysListCmd() *cobra.Command {
	return &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List what opens the encrypted volumes", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.keys(cmd.Context(), func(ctx context.Context, c storagev1.KeysClient) error {
			l, err := c.ListKeys(ctx, &storagev1.ListKeysRequest{})
			if err != nil {
				return err
			}
			return a.print(l, func() *table {
				t := newTable("ID", "VOLUME", "KIND", "DETAIL")
				for _, k := range l.Keys {
					t.add(k.Id, k.Volume, k.Kind, k.Detail)
				}
				return t
			})
		})
	}}
}

func (a *app) keysAddCmd() *cobra.Command {
	r := &storagev1.AddKeyRequest{}
	c := &cobra.Command{Use: "add KIND", Short: "Add a key: tpm, recovery, passphrase, keyFile or kms", Args: cobra.ExactArgs(1),
		Long:      "Add a key to the encrypted volumes. A passphrase is asked for, or read from standard input.",
		ValidArgs: []string{"tpm", "recovery", "passphrase", "keyFile", "kms"},
		Example:   "  bhctl storage keys add passphrase\n  bhctl storage keys add keyFile --partition KEY\n  bhctl storage keys add kms --address 10.0.0.9:4050 --pin sha256:…",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if r.Kind = args[0]; r.Kind == unlock.Passphrase {
				if r.Passphrase, err = a.newPassphrase(); err != nil {
					return err
				}
			}
			return a.keys(cmd.Context(), func(ctx context.Context, c storagev1.KeysClient) error {
				k, err := c.AddKey(ctx, r)
				if err != nil {
					return err
				}
				return a.printKey(k, "added", k.Key, k.RecoveryKey)
			})
		}}
	f := c.Flags()
	f.StringVar(&r.Partition, "partition", "", "for keyFile: name of the partition that starts with the key (4096 bytes)")
	f.StringVar(&r.Firmware, "firmware", "", "for keyFile: name of the fw_cfg file that is the key")
	f.StringVar(&r.Address, "address", "", "for kms: HOST:PORT of the key service")
	f.StringVar(&r.Pin, "pin", "", "for kms: sha256: and the digest of the public key in its certificate")
	return c
}

// newPassphrase asks twice on a terminal.
func (a *app) newPassphrase() (string, error) {
	first, err := a.secret(unlock.Passphrase)
	if err != nil {
		return "", err
	}
	if _, err := unlock.Normalize(unlock.Passphrase, first); err != nil {
		return "", err
	}
	if f, ok := a.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		again, err := a.secret("again")
		if err != nil {
			return "", err
		}
		if again != first {
			return "", errors.New("the two are not the same; nothing was changed")
		}
	}
	return first, nil
}

func (a *app) keysRemoveCmd() *cobra.Command {
	r := &storagev1.RemoveKeyRequest{}
	c := &cobra.Command{Use: "remove ID", Aliases: []string{"rm"}, Short: "Remove a key for ever", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		r.Id = args[0]
		return a.keys(cmd.Context(), func(ctx context.Context, c storagev1.KeysClient) error {
			_, err := c.RemoveKey(ctx, r)
			return err
		})
	}}
	c.Flags().BoolVar(&r.AllowLocked, "allow-locked", false, "also the last one that opens STATE without a person: somebody must unlock it from the next start on")
	return c
}

func (a *app) keysRotateCmd() *cobra.Command {
	return &cobra.Command{Use: "rotate ID", Short: "Replace a key by a new one of its kind", Args: cobra.ExactArgs(1),
		Long: "Replace a key by a new one of its kind, in one step.\n  A recovery key: the new one is printed, once.\n  The TPM's: it is sealed anew, to the firmware's keys as they are now.\n  A passphrase: the new one is asked for, or read from standard input.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.keys(cmd.Context(), func(ctx context.Context, c storagev1.KeysClient) error {
				r := &storagev1.RotateKeyRequest{Id: args[0]}
				l, err := c.ListKeys(ctx, &storagev1.ListKeysRequest{})
				if err != nil {
					return err
				}
				for _, k := range l.Keys {
					if k.Id == r.Id && k.Kind == unlock.Passphrase {
						if r.Passphrase, err = a.newPassphrase(); err != nil {
							return err
						}
					}
				}
				k, err := c.RotateKey(ctx, r)
				if err != nil {
					return err
				}
				return a.printKey(k, "replaced by", k.Key, k.RecoveryKey)
			})
		}}
}

func (a *app) keysRecoveryCmd() *cobra.Command {
	return &cobra.Command{Use: "recovery", Short: "Show the recovery key that was made with the volumes, for the last time", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.keys(cmd.Context(), func(ctx context.Context, c storagev1.KeysClient) error {
			shown, err := a.showRecovery(ctx, c)
			if err == nil && !shown {
				return errors.New("there is no recovery key to show; a new one is made by: bhctl storage keys rotate ID")
			}
			return err
		})
	}}
}

// showRecovery prints a recovery key that nobody has acknowledged yet, and acknowledges it once it was written. Nodes without one, or older ones, say nothing.
func (a *app) showRecovery(ctx context.Context, c storagev1.KeysClient) (bool, error) {
	var r *storagev1.GetRecoveryKeyResponse
	for {
		var err error
		r, err = c.GetRecoveryKey(ctx, &storagev1.GetRecoveryKeyRequest{})
		if err == nil {
			break
		}
		if errs.Is(err, errs.NotFound) || errs.Is(err, errs.Denied) || status.Code(err) == codes.Unimplemented { // none, not for this caller, an older node
			return false, nil
		}
		if !errs.Is(err, errs.Unavailable) {
			return false, err
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil { // VAR is still being made
			return false, err
		}
	}
	if err := a.printRecovery(r.RecoveryKey); err != nil {
		return false, err
	}
	_, err := c.AcknowledgeRecoveryKey(ctx, &storagev1.AcknowledgeRecoveryKeyRequest{})
	return true, err
}

func (a *app) printRecovery(key string) error {
	out := a.out
	if a.format != "table" {
		out = a.err // standard output is for a program
	}
	_, err := fmt.Fprintf(out, `
  Recovery key of %s's encrypted volumes:

      %s

  Write it down and keep it away from the node. It opens them when the TPM does not (bhctl unlock), it is stored nowhere, and it
  is not shown again. Who has it and the disk has the data.

`, cmp.Or(a.label, "this node"), key)
	return err
}

// printKey prints what became of a key, and a new recovery key.
func (a *app) printKey(all any, what string, k *storagev1.Key, recovery string) error {
	if a.format != "table" {
		return a.print(all, nil)
	}
	fmt.Fprintf(a.out, "%s %s (%s)\n", what, k.Id, k.Kind)
	if recovery == "" {
		return nil
	}
	return a.printRecovery(recovery)
}
