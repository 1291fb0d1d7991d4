package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
)

func (a *app) secureBootCmd() *cobra.Command {
	c := &cobra.Command{Use: "secureboot", Short: "Keys of the machine's firmware"}
	r := &storagev1.EnrollKeysRequest{}
	yes := false
	enroll := &cobra.Command{Use: "enroll", Short: "Write the image's keys into a firmware in setup mode", Args: cobra.NoArgs,
		Long: "Write the image's Secure Boot keys into a firmware that is in setup mode (bhctl get security: firmware.setup-mode is on). From the next start on only what they\n" +
			"have signed starts.\n\n" +
			"That goes for the option ROMs of the machine's cards, too: graphics, network, storage. They are signed by their makers, or by Microsoft, whom these\n" +
			"keys do not name. A machine that needs one to start may not start any more, not even into its setup; a virtual machine is safe. Try it on one\n" +
			"machine of a kind, where somebody can reset the firmware.\n\n" +
			"A STATE that opens by the TPM is for the firmware as it is now. With --allow-locked it is locked at the next start: open it with its recovery key\n" +
			"(bhctl unlock), and rotate the TPM's key (bhctl storage keys).",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.confirmEnroll(yes); err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				resp, err := storagev1.NewSecureBootClient(conn).EnrollKeys(ctx, r)
				if err != nil {
					return err
				}
				if a.format != "table" {
					return a.print(resp, nil)
				}
				fmt.Fprintln(a.out, "The firmware has the image's keys. Secure Boot is on from the next start: bhctl reboot")
				if resp.Locks {
					fmt.Fprintln(a.out, "STATE will be locked then: bhctl unlock with its recovery key, then bhctl storage keys rotate the TPM's.")
				}
				return nil
			})
		}}
	f := enroll.Flags()
	f.BoolVar(&r.AllowLocked, "allow-locked", false, "STATE may be locked at the next start: the recovery key is at hand")
	f.BoolVar(&yes, "yes", false, "do not ask")
	c.AddCommand(enroll)
	return c
}

// confirmEnroll lets a person say that the machine's cards were thought of.
func (a *app) confirmEnroll(yes bool) error {
	if yes {
		return nil
	}
	fmt.Fprintln(a.err, "Cards whose option ROMs these keys have not signed do not work any more, and a machine that needs one does not start. Type enroll to go on.")
	if typed, err := a.typed(); err != nil || typed != "enroll" {
		return errors.Join(err, errors.New("that is not the word; nothing was changed"))
	}
	return nil
}
