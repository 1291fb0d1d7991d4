package peer

import (
	"context"
	"slices"
	"strings"
)

// NodeKey is the metadata under which a client names the node that is to answer; apid passes the call on to that node's apid.
const NodeKey = "bulkhead-node"

// ControlPlanes, as a node's name under NodeKey, is for daemons of this node: whichever control plane answers, this one first.
const ControlPlanes = "@controlplane"

// HopKey is the metadata that apid adds to a call that it passes on to another node's apid, which never passes it on again.
const HopKey = "bulkhead-hop"

// How apid names another node that calls: NodePrefix and its name, with RoleNode and one of the two others. No person or program can have such a name or role.
const (
	NodePrefix       = "node:"
	RoleNode         = "node"
	RoleControlPlane = "node-controlplane"
	RoleWorker       = "node-worker"
)

// NodeFrom returns the name of the node that calls, and whether it is a control plane; ok is false if the caller is none.
func NodeFrom(ctx context.Context) (name string, controlPlane, ok bool) {
	c := CallerFrom(ctx)
	name, ok = strings.CutPrefix(c.Name, NodePrefix)
	if !ok || name == "" || !slices.Contains(c.Roles, RoleNode) {
		return "", false, false
	}
	return name, slices.Contains(c.Roles, RoleControlPlane), true
}
