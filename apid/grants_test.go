package apid

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// tellAccess hands apid a document, as machined does. Later ones replace it.
func (n *node) tellAccess(document string) {
	n.t.Helper()
	have, _ := n.daemon.spec.Get()
	_, err := controlv1.NewControlClient(n.as(uid.Machined)).SetSpec(n.ctx(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: have.generation + 1, Documents: []byte(document)}})
	n.must(err)
}

func (n *node) holder(roles ...string) client.Credentials {
	subject := pkix.Name{CommonName: "ann"}
	for _, r := range roles {
		subject.Organization = append(subject.Organization, "bulkhead:"+r)
	}
	return n.trustd.holder(n.trustd.ca, subject, -time.Minute, time.Hour)
}

const rebooters = `apiVersion: bulkhead.dev/v1
kind: Access
roles:
- name: reboots-workers
  allow: [machine.v1.Machine/GetVersion, machine.v1.Machine/Reboot]
  nodes: {roles: [worker]}
`

// A role of the document is good on the nodes that it is for, through whatever node the call goes, and each node judges by its own document.
func TestCustomRoleAcrossNodes(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1")
	for _, n := range c.nodes {
		n.machined(&fakeMachined{})
	}
	cp1, w1 := c.nodes["cp1"], c.nodes["w1"]
	cp1.tellAccess(rebooters)
	cp1.trustd = c.f
	conn := cp1.dial(cp1.holder("reboots-workers"))
	reboot := func(node string) error {
		_, err := machinev1.NewMachineClient(conn).Reboot(client.OnNode(cp1.ctx(), node), &machinev1.RebootRequest{})
		return err
	}
	err := reboot("w1") // whose document does not know the role yet
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "needs role operator or admin") {
		t.Errorf("a node that does not know the role: %v", err)
	}
	w1.tellAccess(rebooters)
	if err := reboot("w1"); err != nil {
		t.Errorf("a worker: %v", err)
	}
	for _, node := range []string{"", "cp1", "cp2"} {
		if err := reboot(node); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "role reboots-workers is for other nodes") {
			t.Errorf("control plane %q: %v", node, err)
		}
	}
	w1.tellAccess(strings.Replace(rebooters, "[worker]", "[controlplane]", 1))
	if err := reboot("w1"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), `on node "w1"`) {
		t.Errorf("a worker that says that the role is not for workers: %v", err)
	}
	cp1.tellAccess("")
	if err := reboot("w1"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a role that was taken away, on the same connection: %v", err)
	}
}

func TestWhoAmI(t *testing.T) {
	n := newNode(t, true)
	n.tellAccess(rebooters)
	for _, c := range []struct {
		creds client.Credentials
		want  string
	}{
		{n.holder("reader", "reboots-workers", "gone"), "ann certificate [reader reboots-workers] [machine.v1.Machine/GetVersion machine.v1.Machine/Reboot]"},
		{n.trustd.mint("bob", "reboots-workers"), "bob token [reboots-workers] [machine.v1.Machine/GetVersion machine.v1.Machine/Reboot]"},
		{n.trustd.mint("eve"), "eve token [] []"},
	} {
		r, err := accessv1.NewAccessClient(n.dial(c.creds)).WhoAmI(n.ctx(), &accessv1.WhoAmIRequest{})
		n.must(err)
		if got := fmt.Sprint(r.Name, " ", r.How, " ", r.Roles, " ", r.Methods); got != c.want || r.Id == "" || time.Until(r.Expires.AsTime()) > time.Hour {
			t.Errorf("got %s (%v), want %s", got, r, c.want)
		}
	}
	_, err := accessv1.NewAccessClient(n.strangerConn()).WhoAmI(n.ctx(), &accessv1.WhoAmIRequest{})
	wantCode(t, "a stranger", err, codes.Unauthenticated)
	_, err = accessv1.NewAccessClient(n.strangerConn()).GetIssuer(metadata.AppendToOutgoingContext(context.Background(), "bulkhead-node", "other"), &accessv1.GetIssuerRequest{})
	wantCode(t, "a stranger who asks another node through this one", err, codes.Unauthenticated)
}

// Without roles and issuer nothing is made.
func TestNothingWithoutAccess(t *testing.T) {
	if g := newGrants(config.Defaults().Access); g != nil {
		t.Errorf("made %+v", g)
	}
}

// A plan says what changes in who may do what.
func TestPlanAccess(t *testing.T) {
	n := newNode(t, true)
	plan := func(document string) string {
		r, err := controlv1.NewControlClient(n.as(uid.Machined)).PlanSpec(n.ctx(), &controlv1.PlanSpecRequest{Spec: &controlv1.Spec{Generation: 9, Documents: []byte(document)}})
		n.must(err)
		return strings.Join(r.Steps, "\n")
	}
	if got := plan(rebooters); !strings.Contains(got, "Access.roles") || !strings.Contains(got, "reboots-workers") {
		t.Errorf("got %s", got)
	}
	n.tellAccess(rebooters)
	if got := plan(rebooters); got != "" {
		t.Errorf("the same again: %s", got)
	}
}
