package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// invitationFor is what a node is told that joins by its TPM: the fingerprints that the user gave, or those of the context's authorities (PEM).
func invitationFor(given []string, authority string) (string, error) {
	var all []string
	for _, g := range given {
		d, err := attest.ParseDigest(g)
		if err != nil {
			return "", fmt.Errorf("--ca-hash: %w", err)
		}
		all = append(all, d)
	}
	for rest := []byte(authority); len(given) == 0; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		d := sha256.Sum256(b.Bytes)
		all = append(all, hex.EncodeToString(d[:]))
	}
	if len(all) == 0 {
		return "", errors.New("--tpm: the context has no authority of its own; give --ca-hash")
	}
	return attest.Invitation(all...), nil
}

// short is how a fingerprint is shown in tables.
func short(fingerprint string) string { return fingerprint[:min(len(fingerprint), 16)] }

// allowFlags are what a user says about machines that may join by their TPM.
type allowFlags struct {
	r        trustv1.AllowAttestationRequest
	makers   []string // files
	pcrs     []string
	imageKey string
	ttl      time.Duration
}

func (a *app) attestCmd() *cobra.Command {
	c := &cobra.Command{Use: "attest", Short: "Which machines may join the cluster by their TPM, without a token"}
	c.AddCommand(a.attestAllowCmd(),
		&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List what is allowed, and who has joined by it", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				l, err := trustv1.NewMembershipClient(conn).ListAttestations(ctx, &trustv1.ListAttestationsRequest{})
				if err != nil {
					return err
				}
				return a.print(l, func() *table { return attestTable(l) })
			})
		}},
		&cobra.Command{Use: "revoke ID", Short: "Let nobody join any more by what was allowed; who has joined stays", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := trustv1.NewMembershipClient(conn).RevokeAttestation(ctx, &trustv1.RevokeAttestationRequest{Id: args[0]})
				return err
			})
		}})
	return c
}

func (a *app) attestAllowCmd() *cobra.Command {
	var f allowFlags
	c := &cobra.Command{Use: "allow --role ROLE --ek FINGERPRINT", Short: "Let a machine join by its TPM", Args: cobra.NoArgs,
		Long: `Let a machine join by its TPM 2.0, without a token: it proves which TPM it has, and what it was started with. Then: bhctl join ADDRESS --code CODE --name NAME --tpm

--ek names the machine by the SHA-256 of its TPM's endorsement key (ECC P-256; SubjectPublicKeyInfo). A machine that is not allowed is told its own when it tries. It may come
back after it was reset, under the name that it first joined with. With --ek-ca instead, a file with certificates of makers of TPMs, one machine of such a maker joins, once;
then it must also be said what it was started with, by --image-key or --pcr 11=….`,
		Example: "  bhctl attest allow --role worker --name node4 --ek 3f0c…\n  bhctl attest allow --role worker --ek-ca maker.pem --image-key pcr-public.pem --ttl 1h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.complete(); err != nil {
				return err
			}
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := trustv1.NewMembershipClient(conn).AllowAttestation(ctx, &f.r)
				if err != nil {
					return err
				}
				if a.format != "table" {
					return a.print(r, nil)
				}
				return a.say("%s: good for one %s until %s. bhctl attest revoke %s makes it void\n", r.Id, f.r.Role, r.Expires.AsTime().Local().Format(time.DateTime), r.Id)
			})
		}}
	fl := c.Flags()
	fl.StringVar(&f.r.Role, "role", "", "what the machine becomes: controlplane or worker")
	fl.StringVar(&f.r.Name, "name", "", "only under this name")
	fl.StringVar(&f.r.EndorsementKey, "ek", "", "fingerprint of the machine's endorsement key")
	fl.StringSliceVar(&f.makers, "ek-ca", nil, "file with certificates (PEM) of makers of TPMs; may be given more than once")
	fl.StringSliceVar(&f.pcrs, "pcr", nil, "7=HEX (Secure Boot) or 11=HEX (the image): what the TPM must have, of SHA-256")
	fl.StringVar(&f.imageKey, "image-key", "", "the image must be signed with this key of PCR policies: its fingerprint, or a file with the public key")
	fl.DurationVar(&f.ttl, "ttl", 24*time.Hour, "how long it is good; at most 8784h")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(nodeRoles, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// complete makes the request of what the user said.
func (f *allowFlags) complete() error {
	switch {
	case !slices.Contains(nodeRoles, f.r.Role):
		return fmt.Errorf("--role: %q is none of %s", f.r.Role, strings.Join(nodeRoles, ", "))
	case (f.r.EndorsementKey == "") == (len(f.makers) == 0):
		return errors.New("--ek, --ek-ca: give one of them; a machine that is not allowed is told its endorsement key's fingerprint when it tries to join")
	case f.ttl < time.Second:
		return fmt.Errorf("--ttl: %s is too short; at least 1s", f.ttl)
	}
	f.r.TtlSeconds = uint64(f.ttl.Seconds())
	for _, p := range f.pcrs {
		n, value, _ := strings.Cut(p, "=")
		switch n {
		case "7":
			f.r.Pcr7 = value
		case "11":
			f.r.Pcr11 = value
		default:
			return fmt.Errorf("--pcr: %q; allowed are 7=HEX and 11=HEX", p)
		}
		if _, err := attest.ParseDigest(value); err != nil {
			return fmt.Errorf("--pcr %s: %w", n, err)
		}
	}
	for _, path := range f.makers {
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("--ek-ca: %w", err)
		}
		f.r.EndorsementAuthorities += string(data)
	}
	return f.readImageKey()
}

func (f *allowFlags) readImageKey() error {
	if f.imageKey == "" {
		return nil
	}
	d, err := attest.ParseDigest(f.imageKey)
	if err != nil {
		data, fileErr := os.ReadFile(f.imageKey)
		if fileErr != nil {
			return fmt.Errorf("--image-key: %q is neither a fingerprint (64 hexadecimal digits) nor a file that can be read: %w", f.imageKey, fileErr)
		}
		key, err := pcrpolicy.ParseKey(data)
		if err != nil {
			return fmt.Errorf("--image-key: %s: %w", f.imageKey, err)
		}
		d = pcrpolicy.Fingerprint(key).String()
	}
	f.r.ImageKey = d
	return nil
}

// attestTable has a line for each attestation, with what was shown by it.
func attestTable(l *trustv1.ListAttestationsResponse) *table {
	t := newTable("ID", "ROLE", "FOR", "TPM", "STARTED WITH", "STATE", "USED BY", "AT", "EXPIRES", "MADE BY")
	for _, k := range l.Attestations {
		tpm := short(k.EndorsementKey)
		if tpm == "" {
			tpm = strings.Join(k.EndorsementAuthorities, "; ")
		}
		var with []string
		for _, w := range [][2]string{{"PCR 7 ", k.Pcr7}, {"PCR 11 ", k.Pcr11}, {"image of ", k.ImageKey}} {
			if w[1] != "" {
				with = append(with, w[0]+short(w[1]))
			}
		}
		at := ""
		for _, m := range l.Members {
			if m.Attested.GetId() == k.Id {
				at = m.Attested.At.AsTime().Local().Format(time.DateTime)
			}
		}
		t.add(k.Id, k.Role, orDash(k.Name), tpm, orDash(strings.Join(with, ", ")), k.State, orDash(k.UsedBy), orDash(at), k.Expires.AsTime().Local().Format(time.DateTime), k.MadeBy)
	}
	return t
}
