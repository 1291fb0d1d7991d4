package etcdd

import (
	"context"
	"fmt"
	"strconv"
	"sync"

	"go.etcd.io/etcd/api/v3/authpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/sync/errgroup"
)

// figures is what the member says of itself.
type figures struct {
	Version, ID, Cluster            string
	Leader                          bool
	Revision, Term, Index           uint64
	DatabaseBytes, DatabaseUsedByte uint64
	Errors                          []string
}

func readFigures(ctx context.Context, c *clientv3.Client, e *embed.Etcd) (figures, error) {
	st, err := c.Status(ctx, c.Endpoints()[0])
	if err != nil {
		return figures{}, fmt.Errorf("status: %w", err)
	}
	return figures{
		Version: st.Version, ID: hexID(st.Header.GetMemberId()), Cluster: hexID(st.Header.GetClusterId()),
		Leader: st.Leader == uint64(e.Server.MemberID()), Revision: uint64(st.Header.GetRevision()), Term: st.RaftTerm, Index: st.RaftIndex,
		DatabaseBytes: uint64(st.DbSize), DatabaseUsedByte: uint64(st.DbSizeInUse), Errors: st.Errors,
	}, nil
}

// readAuth reads all users and roles; there are few. It asks for all at once: each answer waits until this member is as far as the leader, which on a busy machine takes a while.
func readAuth(ctx context.Context, c *clientv3.Client) (auth, error) {
	a := auth{Users: map[string][]string{}, Roles: map[string][]grant{}}
	var users, roles []string
	g, all := errgroup.WithContext(ctx)
	ask := func(what string, f func(context.Context) error) {
		g.Go(func() error {
			if err := f(all); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		})
	}
	ask("auth status", func(ctx context.Context) error {
		r, err := c.AuthStatus(ctx)
		if err == nil {
			a.Enabled = r.Enabled
		}
		return err
	})
	ask("user list", func(ctx context.Context) error {
		r, err := c.UserList(ctx)
		if err == nil {
			users = r.Users
		}
		return err
	})
	ask("role list", func(ctx context.Context) error {
		r, err := c.RoleList(ctx)
		if err == nil {
			roles = r.Roles
		}
		return err
	})
	if err := g.Wait(); err != nil {
		return a, err
	}
	var mu sync.Mutex
	g, all = errgroup.WithContext(ctx)
	for _, name := range users {
		ask("user get "+name, func(ctx context.Context) error {
			u, err := c.UserGet(ctx, name)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				a.Users[name] = u.Roles
			}
			return err
		})
	}
	for _, name := range roles {
		ask("role get "+name, func(ctx context.Context) error {
			r, err := c.RoleGet(ctx, name)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				a.Roles[name] = nil
				for _, p := range r.Perm {
					a.Roles[name] = append(a.Roles[name], readGrant(p))
				}
			}
			return err
		})
	}
	return a, g.Wait()
}

// readGrant is of the two forms that doAuth makes; any other becomes a key that the plan does not want.
func readGrant(p *authpb.Permission) grant {
	key, end := string(p.GetKey()), string(p.GetRangeEnd())
	switch {
	case p.GetPermType() == authpb.Permission_READWRITE && end == "":
		return grant{key, false}
	case p.GetPermType() == authpb.Permission_READWRITE && end == clientv3.GetPrefixRangeEnd(key):
		return grant{key, true}
	}
	return grant{strconv.Quote(key) + ".." + strconv.Quote(end) + " " + p.GetPermType().String(), false}
}

// doAuth carries out one step on users and roles. Doing a done step succeeds.
func doAuth(ctx context.Context, c *clientv3.Client, s Step) error {
	var err error
	switch s.Op {
	case "role add":
		_, err = c.RoleAdd(ctx, s.Name)
	case "role delete":
		_, err = c.RoleDelete(ctx, s.Name)
	case "role grant", "role revoke":
		g, end := grantOf(s.Arg), ""
		if g.Prefix {
			end = clientv3.GetPrefixRangeEnd(g.Key)
		}
		if s.Op == "role grant" {
			_, err = c.RoleGrantPermission(ctx, s.Name, g.Key, end, clientv3.PermissionType(clientv3.PermReadWrite))
		} else {
			_, err = c.RoleRevokePermission(ctx, s.Name, g.Key, end)
		}
	case "user add":
		_, err = c.UserAddWithOptions(ctx, s.Name, "", &clientv3.UserAddOptions{NoPassword: true})
	case "user delete":
		_, err = c.UserDelete(ctx, s.Name)
	case "user grant":
		_, err = c.UserGrantRole(ctx, s.Name, s.Arg)
	case "user revoke":
		_, err = c.UserRevokeRole(ctx, s.Name, s.Arg)
	case "auth enable":
		_, err = c.AuthEnable(ctx)
	default:
		return fmt.Errorf("no step %q", s.Op)
	}
	return err
}

func hexID(id uint64) string { return strconv.FormatUint(id, 16) }
