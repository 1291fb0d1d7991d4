package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

var roleNames = []string{"admin", "operator", "reader", "etcd-backup"}

func (a *app) claimCmd() *cobra.Command {
	var code, name, as string
	c := &cobra.Command{Use: "claim ENDPOINT --code CODE", Short: "Become the administrator of a new node", Args: cobra.ExactArgs(1),
		Long:    "Become the administrator of a new node, with the code on its console. The code is never sent: both sides prove that they know it.\nThe key is made here and stays here, in the new context.",
		Example: "  bhctl claim 192.0.2.10:50000 --code 7K3M9-…",
		RunE: func(cmd *cobra.Command, args []string) error {
			if code == "" {
				return errors.New("--code: give the code that the node's console shows")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), defaultTimeout)
			defer cancel()
			cred, err := client.Claim(ctx, args[0], code, name)
			if err != nil {
				return err
			}
			if err := saveContext(as, args[0], cred); err != nil {
				return err
			}
			fmt.Fprintf(a.out, "you own %s; context %q is current. Next: bhctl apply -f node.yaml && bhctl bootstrap\n", args[0], as)
			return nil
		}}
	c.Flags().StringVar(&code, "code", "", "the claim code")
	c.Flags().StringVar(&name, "name", "admin", "your name in the certificate and in the audit log")
	c.Flags().StringVar(&as, "as", "default", "name of the context to make")
	return c
}

func saveContext(name, endpoint string, cred client.Credentials) error {
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	cfg.Contexts[name] = &clusterContext{Endpoint: endpoint, CA: string(cred.CA), Certificate: string(cred.Certificate), Key: string(cred.Key)}
	cfg.Current = name
	return cfg.save()
}

func (a *app) tokenCmd() *cobra.Command {
	var roles []string
	var ttl time.Duration
	var name string
	c := &cobra.Command{Use: "token", Short: "Make a bearer token for REST, Prometheus or CI", Args: cobra.NoArgs,
		Example: "  curl -H \"Authorization: Bearer $(bhctl token --role reader)\" --cacert ca.pem https://NODE:50001/v1/health",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := trustv1.NewTrustClient(conn).MintToken(ctx, &trustv1.MintTokenRequest{Name: name, Roles: roles, TtlSeconds: uint64(ttl.Seconds())})
				if err != nil {
					return err
				}
				if a.format != "table" {
					return a.print(r, nil)
				}
				_, err = fmt.Fprintln(a.out, r.Token)
				return err
			})
		}}
	c.Flags().StringSliceVar(&roles, "role", []string{"reader"}, "role of the token: "+strings.Join(roleNames, ", ")+", or one that the configuration makes (kind Access); may be given more than once")
	c.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is good; at most 720h")
	c.Flags().StringVar(&name, "name", "token", "whom it is for, as the audit log shows it")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(roleNames, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) certificateCmd() *cobra.Command {
	var roles []string
	var ttl time.Duration
	var as string
	var breakGlass bool
	c := &cobra.Command{Use: "certificate NAME --as CONTEXT", Short: "Make a client certificate, as a new context", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		if as == "" {
			return errors.New("--as: give the name of the context to make")
		}
		target, err := a.target()
		if err != nil {
			return err
		}
		key, csr, err := newRequest(args[0])
		if err != nil {
			return err
		}
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			r, err := trustv1.NewTrustClient(conn).IssueCertificate(ctx, &trustv1.IssueCertificateRequest{Csr: csr, Name: args[0], Roles: roles, TtlSeconds: uint64(ttl.Seconds()), BreakGlass: breakGlass})
			if err != nil {
				return err
			}
			cfg, err := loadContexts()
			if err != nil {
				return err
			}
			target.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate}))
			target.Key, target.Token, target.SignIn = string(key), "", nil
			cfg.Contexts[as] = target
			if err := cfg.save(); err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "context %q: %s with roles %s until %s\n", as, args[0], strings.Join(roles, ", "), r.Expires.AsTime().Local().Format(time.DateTime))
			return err
		})
	}}
	c.Flags().StringSliceVar(&roles, "role", []string{"reader"}, "role: "+strings.Join(roleNames, ", ")+", or one that the configuration makes (kind Access); may be given more than once")
	c.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long it is good; at most 8760h")
	c.Flags().StringVar(&as, "as", "", "name of the context to make")
	c.Flags().BoolVar(&breakGlass, "break-glass", false, "one that is let in even while a node's clock is behind the making of the cluster; with --role admin")
	return c
}

// newRequest makes a key (PEM) and a PKCS #10 request for it (DER).
func newRequest(name string) (key, csr []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, k)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), csr, nil
}

func (a *app) kubeconfigCmd() *cobra.Command {
	var server, file string
	var ttl time.Duration
	c := &cobra.Command{Use: "kubeconfig", Short: "Make an administrator's kubeconfig, of limited life", Args: cobra.NoArgs,
		Example: "  bhctl kubeconfig --file kubeconfig && kubectl --kubeconfig kubeconfig get nodes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			target, err := a.target()
			if err != nil {
				return err
			}
			if server == "" {
				server = target.Kubernetes
			}
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := kubernetesv1.NewKubernetesClient(conn).GetKubeconfig(ctx, &kubernetesv1.GetKubeconfigRequest{Server: server, TtlSeconds: uint64(ttl.Seconds())})
				if err != nil {
					return err
				}
				if file == "" {
					_, err = io.WriteString(a.out, r.Kubeconfig)
					return err
				}
				return writeSecret(file, []byte(r.Kubeconfig))
			})
		}}
	c.Flags().StringVar(&server, "server", "", "URL of the API server as reached from here (default: the context's, else the cluster's endpoint)")
	c.Flags().StringVar(&file, "file", "", "write it there, readable by you alone, instead of printing it")
	c.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long it is good; at most 720h")
	return c
}
