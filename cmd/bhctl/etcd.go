package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
)

// etcd makes a command that calls a member.
func (a *app) etcd(use, short, long string, args cobra.PositionalArgs, f func(context.Context, etcdv1.EtcdClient, []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Long: long, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			return f(ctx, etcdv1.NewEtcdClient(conn), args)
		})
	}}
}

func (a *app) etcdCmd() *cobra.Command {
	c := &cobra.Command{Use: "etcd", Short: "The cluster's etcd, and the node's member of it"}
	c.AddCommand(
		a.etcd("status", "What the member says of itself", "", cobra.NoArgs, a.etcdStatus),
		a.etcd("members", "List the members", "", cobra.NoArgs, a.etcdMembers),
		a.etcd("forfeit-leadership", "Hand leadership to another member", "Hand leadership to another member, if this node's leads. Quick; nothing is lost.", cobra.NoArgs,
			func(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
				r, err := c.ForfeitLeadership(ctx, &etcdv1.ForfeitLeadershipRequest{})
				if err != nil {
					return err
				}
				if r.Leader == "" {
					return a.say("this member goes on leading: it is alone\n")
				}
				return a.say("%s leads\n", r.Leader)
			}),
		a.etcd("remove MEMBER", "Remove another node's member", "Remove another node's member, by the node's name or the member's id. Refused if the others would have no quorum. bhctl node remove does this, and ends\nthe node's membership of the cluster, too.",
			cobra.ExactArgs(1), func(ctx context.Context, c etcdv1.EtcdClient, args []string) error {
				if _, err := c.RemoveMember(ctx, &etcdv1.RemoveMemberRequest{Name: args[0]}); err != nil {
					return err
				}
				return a.say("%s is no member any more\n", args[0])
			}),
		a.etcdLeaveCmd(),
		a.etcd("rejoin", "Let a member come back that left or was removed", "Let the node's member come back, with empty data, after it left or was removed. It gets all data from the others.", cobra.NoArgs,
			func(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
				if _, err := c.Rejoin(ctx, &etcdv1.RejoinRequest{}); err != nil {
					return err
				}
				return a.say("the node's member joins again; bhctl etcd status shows how far it is\n")
			}),
		a.etcd("defrag", "Give the room of deleted data back", "Give the room of deleted data back to the file system. The node's member does not answer meanwhile.", cobra.NoArgs,
			func(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
				r, err := c.Defragment(ctx, &etcdv1.DefragmentRequest{})
				if err != nil {
					return err
				}
				if a.format != "table" {
					return a.print(r, nil)
				}
				return a.say("%s before, %s now\n", bytesText(r.BeforeBytes), bytesText(r.AfterBytes))
			}),
		a.etcdAlarmsCmd(),
		a.etcdSnapshotCmd(),
		a.etcd("snapshots", "List the snapshots that the node has made by its schedule", "List the snapshots that the node has made by its schedule (Cluster.etcd.snapshots in the configuration), each found whole when it was made. They lie on the\n"+
			"node's own disk: bhctl etcd snapshot FILE --from NAME fetches one, bhctl etcd restore --from NAME begins anew with one.", cobra.NoArgs, a.etcdSnapshots),
		a.etcdRestoreCmd(),
	)
	return c
}

func (a *app) etcdLeaveCmd() *cobra.Command {
	r := &etcdv1.LeaveRequest{}
	c := a.etcd("leave", "Remove this node's member and its data", "Remove this node's member and its data; name the node with --node. It does not join again by itself: see bhctl etcd rejoin. Refused for the last member,\nand if the others would have no quorum.",
		cobra.NoArgs, func(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
			if _, err := c.Leave(ctx, r); err != nil {
				return err
			}
			return a.say("the node's member has left\n")
		})
	c.Flags().BoolVar(&r.Force, "force", false, "ask nobody, and only delete this node's member: for one whose cluster is no more, or has gone on without it")
	return c
}

func (a *app) etcdStatus(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
	s, err := c.GetStatus(ctx, &etcdv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	return a.print(s, func() *table {
		t := newTable("MEMBER", "STATE", "VERSION", "LEADER", "REVISION", "TERM", "SIZE", "IN USE", "ALARMS", "DETAIL")
		t.add(s.MemberId, s.State, s.Version, fmt.Sprint(s.Leader), fmt.Sprint(s.Revision), fmt.Sprint(s.RaftTerm),
			bytesText(s.DatabaseBytes), bytesText(s.DatabaseUsedBytes), strings.Join(s.Alarms, " "), s.Detail)
		return t
	})
}

func (a *app) etcdMembers(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
	s, err := c.GetStatus(ctx, &etcdv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	members := []proto.Message{}
	for _, m := range s.GetMembers() {
		members = append(members, m)
	}
	return a.print(members, func() *table {
		t := newTable("ID", "NAME", "VOTER", "PEER URLS")
		for _, m := range s.GetMembers() {
			t.add(m.Id, orDash(m.Name), yes(!m.Learner), strings.Join(m.PeerUrls, ","))
		}
		return t
	})
}

func (a *app) etcdAlarmsCmd() *cobra.Command {
	var disarm bool
	c := a.etcd("alarms", "List the alarms, or put them out", "List the alarms. --disarm puts them out; one whose cause is still there comes back: NOSPACE wants bhctl etcd defrag, or less data.", cobra.NoArgs,
		func(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
			if disarm {
				r, err := c.DisarmAlarms(ctx, &etcdv1.DisarmAlarmsRequest{})
				if err != nil {
					return err
				}
				if a.format != "table" {
					return a.print(r, nil)
				}
				if len(r.Disarmed) == 0 {
					return a.say("there was no alarm\n")
				}
				return a.say("put out: %s\n", strings.Join(r.Disarmed, ", "))
			}
			s, err := c.GetStatus(ctx, &etcdv1.GetStatusRequest{})
			if err != nil {
				return err
			}
			return a.print(append([]string{}, s.GetAlarms()...), func() *table {
				t := newTable("ALARM")
				for _, x := range s.Alarms {
					t.add(x)
				}
				return t
			})
		})
	c.Flags().BoolVar(&disarm, "disarm", false, "put them out")
	return c
}
