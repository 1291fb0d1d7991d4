package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
)

// Of following a replacement of authorities.
const (
	rotationLook = time.Second      // between two looks
	rotationHint = 15 * time.Second // without progress, until it is said what to do
)

func (a *app) trustCmd() *cobra.Command {
	c := &cobra.Command{Use: "trust", Short: "The cluster's authorities, and this user's certificate"}
	c.AddCommand(a.rotateCmd(), &cobra.Command{Use: "renew", Short: "Get a new certificate with the same rights, and the authorities of now, into the context", Args: cobra.NoArgs,
		Long: "Get a new certificate with the same name, roles and remaining life, break-glass if the old one is, into the context, and the authorities that the cluster trusts now. Needs role admin.",
		RunE: func(cmd *cobra.Command, _ []string) error { return a.renew(cmd.Context(), true) }})
	return c
}

func (a *app) rotateCmd() *cobra.Command {
	var which []string
	var abort, status, now bool
	c := &cobra.Command{Use: "rotate-ca", Short: "Replace certificate authorities while all goes on", Args: cobra.NoArgs,
		Long: `Replace certificate authorities while all goes on, in stages: prepare (all nodes trust the new one, too), issue (it signs; certificates of daemons are replaced at once),
finish (the old one is removed). Each stage begins when every node has done the one before. It goes on by itself, whether or not this command does.

Between issue and finish lies a day: until then people and programs renew what they hold, with bhctl trust renew, bhctl token or bhctl certificate. --now goes on without that wait; give it
again to end a wait that has begun. The authority os is that of Bulkhead's API, etcd that of etcd and its clients, kubernetes that of Kubernetes (with the key for service accounts' tokens), front-proxy that by which its API servers
are known to extensions. For each but os the API servers start anew twice, one after the other, for kubernetes also the kubelets; pods run on. Before the old authority of Kubernetes is removed people need a new kubeconfig (bhctl kubeconfig), and
pods that talk to Kubernetes and do not read their files again must be started anew (kubectl rollout restart); with --now all that do so, for their tokens are void. What is of the old authority is worth nothing afterwards, bearer tokens and join tokens too. This context is renewed on the way.`,
		Example: "  bhctl trust rotate-ca\n  bhctl trust rotate-ca --status\n  bhctl trust rotate-ca --now",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if abort && (status || now) || status && now {
				return errors.New("--abort, --status, --now: give one of them")
			}
			if slices.Equal(which, []string{"all"}) {
				which = nil
			}
			switch {
			case status:
				return a.rotationStatus(cmd.Context())
			case abort:
				return a.abortRotation(cmd.Context())
			}
			return a.rotate(cmd.Context(), which, now)
		}}
	c.Flags().StringSliceVar(&which, "which", []string{"os"}, "os, etcd, kubernetes, front-proxy, or all of them")
	c.Flags().BoolVar(&abort, "abort", false, "go back to the old authorities; possible until finish")
	c.Flags().BoolVar(&status, "status", false, "only say how far it is")
	c.Flags().BoolVar(&now, "now", false, "remove the old authorities as soon as all nodes have certificates of the new ones")
	return c
}

// rotation makes one call about the replacement.
func (a *app) rotation(ctx context.Context, f func(context.Context, trustv1.AuthoritiesClient) (*trustv1.Rotation, error)) (r *trustv1.Rotation, err error) {
	err = a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err = f(ctx, trustv1.NewAuthoritiesClient(conn))
		return err
	})
	return r, err
}

func (a *app) getRotation(ctx context.Context) (*trustv1.Rotation, error) {
	return a.rotation(ctx, func(ctx context.Context, c trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
		return c.GetRotation(ctx, &trustv1.GetRotationRequest{})
	})
}

func (a *app) rotationStatus(ctx context.Context) error {
	r, err := a.getRotation(ctx)
	if err != nil {
		return err
	}
	if a.format != "table" {
		return a.print(r, nil)
	}
	return a.say("%s\n", rotationText(r))
}

// rotationText says how far a replacement is, and what to do.
func rotationText(r *trustv1.Rotation) string {
	if r.Stage == "" {
		return "no authority was ever replaced"
	}
	text := fmt.Sprintf("authorities %s, by %s: %s since %s", strings.Join(r.Which, ", "), r.By, r.Stage, r.Entered.AsTime().Local().Format(time.DateTime))
	if len(r.Waiting) > 0 {
		text += "; not done by " + strings.Join(r.Waiting, ", ") + "\n  A node that is away blocks the next stage: bring it up, or, if it is lost, bhctl node remove NAME. Of one that is there, bhctl -n NAME get kubernetes says what it waits for"
	} else if r.Finish != nil {
		text += "; the old ones are removed at " + r.Finish.AsTime().Local().Format(time.DateTime) + ", or with bhctl trust rotate-ca --now"
	}
	return text
}

func (a *app) abortRotation(ctx context.Context) error {
	if _, err := a.rotation(ctx, func(ctx context.Context, c trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
		return c.AbortRotation(ctx, &trustv1.AbortRotationRequest{})
	}); err != nil {
		return err
	}
	if err := a.followRotation(ctx, "abort"); err != nil {
		return err
	}
	if err := a.renew(ctx, false); err != nil { // the new authority is still believed for a moment
		return err
	}
	if err := a.followRotation(ctx, "aborted"); err != nil {
		return err
	}
	return a.renew(ctx, false)
}

func (a *app) rotate(ctx context.Context, which []string, now bool) error {
	start := func(skip bool) error {
		_, err := a.rotation(ctx, func(ctx context.Context, c trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
			return c.StartRotation(ctx, &trustv1.StartRotationRequest{Which: which, SkipWait: skip})
		})
		return err
	}
	if err := start(false); err != nil {
		return err
	}
	if err := a.followRotation(ctx, "issue"); err != nil {
		return err
	}
	// Before the old authority goes, or this user is locked out.
	if err := a.renew(ctx, false); err != nil {
		return err
	}
	if !now {
		return a.rotationStatus(ctx)
	}
	if err := start(true); err != nil {
		return err
	}
	if err := a.followRotation(ctx, "done"); err != nil {
		return err
	}
	return a.renew(ctx, false) // forgets the old authority
}

// followRotation says what happens until a stage is done, or one after it begins.
func (a *app) followRotation(ctx context.Context, stage string) error {
	order := []string{"prepare", "issue", "finish", "done"}
	said, since := "", time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		r, err := a.getRotation(ctx)
		if err != nil {
			return err
		}
		if line := r.Stage + " " + strings.Join(r.Waiting, ","); line != said {
			said, since = line, time.Now()
			text := r.Stage
			if len(r.Waiting) > 0 {
				text += ": waits for " + strings.Join(r.Waiting, ", ")
			}
			if err := a.say("%s\n", text); err != nil {
				return err
			}
		} else if len(r.Waiting) > 0 && time.Since(since) > rotationHint {
			since = time.Now()
			fmt.Fprintln(a.err, rotationText(r))
		}
		at, want := slices.Index(order, r.Stage), slices.Index(order, stage)
		switch {
		case r.Stage == stage && len(r.Waiting) == 0, at > want && want >= 0, r.Stage == "aborted" && stage == "abort":
			return nil
		case (r.Stage == "abort" || r.Stage == "aborted") && want >= 0:
			return errors.New("somebody aborted it")
		}
		timer.Reset(rotationLook)
	}
}

// renew brings certificate and authorities of the context up to date; strict: also a certificate that is of an authority that signs.
func (a *app) renew(ctx context.Context, strict bool) error {
	target, err := a.target()
	if err != nil {
		return err
	}
	block, _ := pem.Decode([]byte(target.Certificate))
	if block == nil && target.SignIn != nil { // the issuer's keys are not replaced
		return a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			ca, _, err := osAuthorities(ctx, conn, nil)
			if err != nil {
				return err
			}
			return a.keep(func(c *clusterContext) { c.CA = ca })
		})
	}
	if block == nil {
		if strict {
			return errors.New("this context has no certificate but a token: get another one, bhctl token")
		}
		fmt.Fprintln(a.err, "note: you use a bearer token; those of before are worth nothing when the old authority is removed: get another one, bhctl token")
		return nil
	}
	old, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("this context's certificate: %w", err)
	}
	r := &trustv1.IssueCertificateRequest{Name: old.Subject.CommonName, TtlSeconds: uint64(max(time.Until(old.NotAfter), time.Hour).Seconds())}
	for _, o := range old.Subject.Organization {
		if role, ok := strings.CutPrefix(o, "bulkhead:"); ok {
			r.Roles = append(r.Roles, role)
		}
	}
	r.BreakGlass = breakGlass(old, target.CA)
	return a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		ca, signs, err := osAuthorities(ctx, conn, old)
		if err != nil {
			return err
		}
		if signs && !strict {
			return a.keep(func(c *clusterContext) { c.CA = ca })
		}
		key, csr, err := newRequest(r.Name)
		if err != nil {
			return err
		}
		r.Csr = csr
		resp, err := trustv1.NewTrustClient(conn).IssueCertificate(ctx, r)
		if err != nil {
			return err
		}
		if err := a.keep(func(c *clusterContext) {
			c.CA, c.Key = ca, string(key)
			c.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: resp.Certificate}))
		}); err != nil {
			return err
		}
		return a.say("this context has a new certificate, until %s\n", resp.Expires.AsTime().Local().Format(time.DateTime))
	})
}

// osAuthorities returns those that the cluster trusts for Bulkhead's API (PEM), and whether the one that signs has signed c, which may be nil.
func osAuthorities(ctx context.Context, conn *grpc.ClientConn, c *x509.Certificate) (ca string, signs bool, err error) {
	list, err := trustv1.NewTrustClient(conn).ListCertificates(ctx, &trustv1.ListCertificatesRequest{})
	if err != nil {
		return "", false, err
	}
	for _, x := range list.Certificates {
		if x.Profile == "os-ca" && x.Pem != "" {
			ca += x.Pem
			signs = signs || c != nil && x.State == "signs" && issuedBy(c, x.Pem)
		}
	}
	return ca, signs, nil
}

// breakGlass reports whether a certificate is as old as the one of the authorities (PEM) that signed it.
func breakGlass(c *x509.Certificate, authorities string) bool {
	for rest := []byte(authorities); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return false
		}
		if ca, err := x509.ParseCertificate(block.Bytes); err == nil && c.CheckSignatureFrom(ca) == nil && c.NotBefore.Equal(ca.NotBefore) {
			return slices.Contains(c.Subject.Organization, "bulkhead:admin")
		}
	}
}

func issuedBy(c *x509.Certificate, authority string) bool {
	block, _ := pem.Decode([]byte(authority))
	if block == nil {
		return false
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	return err == nil && c.CheckSignatureFrom(ca) == nil
}

// keep changes the context that is used.
func (a *app) keep(f func(*clusterContext)) error {
	unlock, err := lockContexts()
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	c := cfg.Contexts[cmp.Or(a.contextName, cfg.Current)]
	if c == nil {
		return nil
	}
	before := *c
	if f(c); before.CA == c.CA && before.Certificate == c.Certificate {
		return nil
	}
	return cfg.save()
}

// learn keeps an authority that the context's own vouches for: the cluster replaces the old one, and will show nothing of it soon.
func (a *app) learn(authority []byte) {
	added := false
	err := a.keep(func(c *clusterContext) {
		if !strings.Contains(c.CA, string(authority)) {
			c.CA, added = strings.TrimRight(c.CA, "\n")+"\n"+string(authority), true
		}
	})
	switch {
	case err != nil:
		fmt.Fprintf(a.err, "note: the cluster replaces its authority, but the new one cannot be kept: %v\n", err)
	case added:
		fmt.Fprintln(a.err, "note: the cluster replaces its authority; this context knows the new one, too. Renew your certificate before the old one is removed (bhctl trust rotate-ca --status says when): bhctl trust renew,\n  or ask an administrator for another one.")
	}
}
