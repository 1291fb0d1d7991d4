package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

var nodeRoles = []string{"controlplane", "worker"}

// removeLimit is how long a node may take to see that a member of etcd is gone.
const removeLimit = 10 * time.Second

// joinTime is how long a node may take to find a control plane and be admitted.
const joinTime = 2 * time.Minute

func clusterResources() map[string]resource {
	return map[string]resource{
		"nodes": of("the cluster's nodes and how they are", []string{"NAME", "ROLE", "STATE", "VERSION", "ADDRESSES", "DETAIL"},
			func(ctx context.Context, conn *grpc.ClientConn) (*clusterv1.ListNodesResponse, error) {
				return clusterv1.NewRegistryClient(conn).ListNodes(ctx, &clusterv1.ListNodesRequest{})
			},
			func(ctx context.Context, conn *grpc.ClientConn, f func(*clusterv1.ListNodesResponse) error) error {
				s, err := clusterv1.NewRegistryClient(conn).WatchNodes(ctx, &clusterv1.WatchNodesRequest{})
				if err != nil {
					return err
				}
				return receive(s, f)
			}, (*clusterv1.ListNodesResponse).GetNodes, nodeRow),
		"members": of("who has joined the cluster, and with which key", []string{"NAME", "ROLE", "ADDRESSES", "JOINED", "TOKEN", "TPM", "KEY"},
			func(ctx context.Context, conn *grpc.ClientConn) (*trustv1.ListMembersResponse, error) {
				return trustv1.NewMembershipClient(conn).ListMembers(ctx, &trustv1.ListMembersRequest{})
			}, nil, (*trustv1.ListMembersResponse).GetMembers, func(m *trustv1.ClusterMember) []string {
				return []string{m.Name, m.Role, strings.Join(m.Addresses, ","), m.Joined.AsTime().Local().Format(time.DateTime), orDash(m.TokenId), orDash(short(m.GetAttested().GetEndorsementKey())), m.Key}
			}),
	}
}

// nodeRow says when a node was heard of only if it is lost: else each report would be a change, which --watch prints.
func nodeRow(n *clusterv1.Node) []string {
	detail := oneLine(n.Detail)
	if n.State == "lost" && n.Seen != nil {
		detail = strings.TrimSuffix("last heard of at "+n.Seen.AsTime().Local().Format(time.DateTime)+"; "+detail, "; ")
	}
	return []string{n.Name, n.Role, n.State, n.Version, strings.Join(n.Addresses, ","), detail}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// joinFlags are what a user says about a node that is to join.
type joinFlags struct {
	code, token, name, role string
	endpoints               []string
	tpm                     bool
	authorities             []string // fingerprints
}

func (a *app) joinCmd() *cobra.Command {
	var f joinFlags
	c := &cobra.Command{Use: "join ADDRESS --code CODE --name NAME", Short: "Make a new node a member of the cluster", Args: cobra.ExactArgs(1),
		Long: `Make a new node a member of the cluster, with the code on its console and a join token. Neither is ever sent in clear: the token is sealed for the node that
knows the code. The node calls a control plane, both prove that they know the token, and the node is the cluster's.

With --tpm the node needs no token: an administrator has allowed its TPM (bhctl attest allow), and it believes the cluster by the fingerprint of its authority,
which is the context's, or what --ca-hash says.

Without --token one is made for this node, by the current context; then --role says what it becomes. Without --endpoint the node is told the context's endpoints:
they must be addresses that the node can reach, too.

The name must be Machine.hostname of the configuration that the node gets next: bhctl -n NAME apply -f NAME.yaml`,
		Example: "  bhctl join 192.0.2.13 --code 7K3M9-… --name node3 --role worker\n  bhctl join 192.0.2.13 --code 7K3M9-… --name node3 --token 8T2… --endpoint 192.0.2.11 --endpoint 192.0.2.12\n  bhctl join 192.0.2.13 --code 7K3M9-… --name node3 --tpm",
		RunE:    func(cmd *cobra.Command, args []string) error { return a.join(cmd.Context(), args[0], f) }}
	fl := c.Flags()
	fl.StringVar(&f.code, "code", "", "the claim code that the node's console shows")
	fl.StringVar(&f.token, "token", "", "join token, of bhctl jointoken create")
	fl.StringVar(&f.name, "name", "", "what the node is called in the cluster")
	fl.StringVar(&f.role, "role", "", "without --token and --tpm: controlplane or worker")
	fl.BoolVar(&f.tpm, "tpm", false, "the node joins by its TPM, without a token; see bhctl attest")
	fl.StringSliceVar(&f.authorities, "ca-hash", nil, "with --tpm: SHA-256 of the cluster's authority os-ca, as bhctl get certificates has it; default: the context's")
	fl.StringSliceVar(&f.endpoints, "endpoint", nil, "control plane, HOST or HOST:PORT as the node reaches it; may be given more than once")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(nodeRoles, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) join(ctx context.Context, address string, f joinFlags) error {
	switch {
	case f.code == "":
		return errors.New("--code: give the code that the node's console shows")
	case f.name == "":
		return errors.New("--name: say what the node is called in the cluster; it must be Machine.hostname of its configuration")
	case f.tpm && (f.token != "" || f.role != ""):
		return errors.New("--tpm: what was allowed with bhctl attest allow says what the node becomes; leave --token and --role out")
	case !f.tpm && len(f.authorities) > 0:
		return errors.New("--ca-hash: only a node that joins by its TPM (--tpm) is told that; a token proves the cluster, too")
	case f.token != "" && f.role != "":
		return errors.New("--role: the token says what the node becomes; leave one of --token and --role out")
	case f.token == "" && !f.tpm && !slices.Contains(nodeRoles, f.role):
		return fmt.Errorf("--role: %q is none of %s; or give a --token, which says it, or --tpm", f.role, strings.Join(nodeRoles, ", "))
	}
	var authority string
	if t, err := a.target(); err == nil {
		authority = t.CA
		if len(f.endpoints) == 0 {
			f.endpoints = t.all()
		}
	} else if f.token == "" && len(f.authorities) == 0 || len(f.endpoints) == 0 {
		return fmt.Errorf("without --token and --endpoint: %w; a node that joins by its TPM needs --ca-hash instead of --token", err)
	}
	if f.tpm {
		invitation, err := invitationFor(f.authorities, authority)
		if err != nil {
			return err
		}
		f.token = invitation
	}
	if f.token == "" {
		t, err := a.makeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: f.role, Name: f.name})
		if err != nil {
			return err
		}
		f.token = t.Token
	}
	ctx, cancel := context.WithTimeout(ctx, max(a.timeout, joinTime))
	defer cancel()
	ca, role, err := client.Join(ctx, address, client.Joining{Code: f.code, Token: f.token, Endpoints: f.endpoints, Name: f.name})
	if err != nil {
		return err
	}
	if authority != "" && !strings.Contains(authority, strings.TrimSpace(string(ca))) {
		return fmt.Errorf("%s has joined another cluster than this context's: it believes another authority. Reset it (on its console), and look at the token and the endpoints", address)
	}
	return a.say("%s is %s, a %s of the cluster. Next: bhctl -n %s apply -f FILE, with Machine.hostname %s and Machine.role %s\n", address, f.name, role, f.name, f.name, role)
}

func (a *app) makeJoinToken(ctx context.Context, r *trustv1.MakeJoinTokenRequest) (t *trustv1.MakeJoinTokenResponse, err error) {
	err = a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		t, err = trustv1.NewMembershipClient(conn).MakeJoinToken(ctx, r)
		return err
	})
	return t, err
}

func (a *app) joinTokenCmd() *cobra.Command {
	c := &cobra.Command{Use: "jointoken", Short: "Who may join the cluster"}
	var r trustv1.MakeJoinTokenRequest
	var ttl time.Duration
	create := &cobra.Command{Use: "create --role ROLE", Short: "Make a token with which one node can join, once", Args: cobra.NoArgs,
		Example: "  bhctl jointoken create --role worker --name node4",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(nodeRoles, r.Role) {
				return fmt.Errorf("--role: %q is none of %s", r.Role, strings.Join(nodeRoles, ", "))
			}
			r.TtlSeconds = uint64(ttl.Seconds())
			t, err := a.makeJoinToken(cmd.Context(), &r)
			if err != nil {
				return err
			}
			if a.format != "table" {
				return a.print(t, nil)
			}
			fmt.Fprintf(a.err, "good for one %s until %s; it is shown once. bhctl jointoken revoke %s makes it void\n", r.Role, t.Expires.AsTime().Local().Format(time.DateTime), t.Id)
			_, err = fmt.Fprintln(a.out, t.Token)
			return err
		}}
	create.Flags().StringVar(&r.Role, "role", "", "what the node becomes: controlplane or worker")
	create.Flags().StringVar(&r.Name, "name", "", "only a node of this name may use it")
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is good; at most 168h")
	_ = create.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(nodeRoles, cobra.ShellCompDirectiveNoFileComp))
	c.AddCommand(create,
		&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List join tokens, without their secrets", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				l, err := trustv1.NewMembershipClient(conn).ListJoinTokens(ctx, &trustv1.ListJoinTokensRequest{})
				if err != nil {
					return err
				}
				return a.print(l, func() *table {
					t := newTable("ID", "ROLE", "FOR", "STATE", "USED BY", "EXPIRES", "MADE BY")
					for _, k := range l.Tokens {
						t.add(k.Id, k.Role, orDash(k.Name), k.State, orDash(k.UsedBy), k.Expires.AsTime().Local().Format(time.DateTime), k.MadeBy)
					}
					return t
				})
			})
		}},
		&cobra.Command{Use: "revoke ID", Short: "Make a join token void", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := trustv1.NewMembershipClient(conn).RevokeJoinToken(ctx, &trustv1.RevokeJoinTokenRequest{Id: args[0]})
				return err
			})
		}})
	return c
}

func (a *app) revokeCmd() *cobra.Command {
	return &cobra.Command{Use: "revoke ID", Short: "Make a certificate or a bearer token void, on all nodes within seconds", Args: cobra.ExactArgs(1),
		Long: "Make a certificate or a bearer token void, on all nodes within seconds. ID is a certificate's serial (bhctl get certificates) or a token's id (bhctl token -o json).",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				if _, err := trustv1.NewMembershipClient(conn).Revoke(ctx, &trustv1.RevokeRequest{Id: args[0]}); err != nil {
					return err
				}
				return a.say("%s is void\n", args[0])
			})
		}}
}

func (a *app) nodeCmd() *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "The cluster's nodes"}
	sure := false
	remove := &cobra.Command{Use: "remove NAME", Short: "End a node's membership", Args: cobra.ExactArgs(1),
		Long: "End a node's membership: its etcd member is removed, if it has one; nothing is signed for it any more; its certificates are void on all nodes within seconds. Its name\n" +
			"can be used again. What is on its disk stays there: reset it, or throw it away. Refused if etcd would lose its quorum.\n\nThe node's name has to be typed, or --yes given.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !sure {
				fmt.Fprintf(a.err, "Node %s loses its place in the cluster. Type its name to go on.\n", args[0])
				if typed, err := a.typed(); err != nil || typed != args[0] {
					return errors.Join(err, errors.New("that is not the name; nothing was changed"))
				}
			}
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error { return a.removeNode(ctx, conn, args[0]) })
		}}
	remove.Flags().BoolVar(&sure, "yes", false, "do not ask for the node's name")
	c.AddCommand(remove)
	return c
}

// removeNode takes a node out of etcd first: trustd refuses to forget one that etcd still counts on.
func (a *app) removeNode(ctx context.Context, conn *grpc.ClientConn, name string) error {
	members, err := trustv1.NewMembershipClient(conn).ListMembers(ctx, &trustv1.ListMembersRequest{})
	if err != nil {
		return err
	}
	var names []string
	for _, m := range members.GetMembers() {
		names = append(names, m.GetName())
	}
	if !slices.Contains(names, name) {
		return errs.New(errs.NotFound, "no node %q; there are: %s", name, strings.Join(names, ", "))
	}
	st, err := etcdv1.NewEtcdClient(conn).GetStatus(ctx, &etcdv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	member := slices.ContainsFunc(st.GetMembers(), func(m *etcdv1.Member) bool { return m.GetName() == name })
	ctx = client.OnNode(ctx, elsewhere(st, name))
	if member {
		if _, err := etcdv1.NewEtcdClient(conn).RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: name}); err != nil {
			return err
		}
		if err := a.say("%s is no etcd member any more\n", name); err != nil {
			return err
		}
	}
	for begin := time.Now(); ; {
		_, err := trustv1.NewMembershipClient(conn).RemoveMember(ctx, &trustv1.RemoveMemberRequest{Name: name})
		if err == nil {
			return a.say("%s is no node of the cluster any more\n", name)
		}
		// The node that is asked may hear a moment later that etcd has lost a member.
		if !member || !errs.Is(err, errs.Precondition) || time.Since(begin) > removeLimit {
			return err
		}
		if err := pause(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
}

// elsewhere returns another control plane to ask if the one that answered is the node that is to go: no member removes itself, and its word would soon count for nothing. "" if
// it is not.
func elsewhere(st *etcdv1.Status, name string) string {
	own, other := false, ""
	for _, m := range st.GetMembers() {
		switch {
		case m.GetName() == name:
			own = m.GetId() == st.GetMemberId()
		case !m.GetLearner():
			other = m.GetName()
		}
	}
	if !own {
		return ""
	}
	return other
}
