package etcdd

import (
	"fmt"
	"slices"
	"strings"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
)

// conditions are snapshots, which count, and on a control plane what explains that the member does not answer. It is pure.
func conditions(want spec, have State) []*controlv1.Condition {
	snapshots := &controlv1.Condition{Name: "snapshots", Trouble: have.Snapshots, Needs: []string{"storaged/VAR.room", "etcdd/member"}}
	if want.Role != config.ControlPlane {
		return []*controlv1.Condition{snapshots}
	}
	certificates := &controlv1.Condition{Name: "certificates", Help: "bhctl get certificates", Explains: true,
		Needs: []string{"trustd/answers", "trustd/converged", "trustd/bootstrap", "trustd/keys", "trustd/certificate"}}
	if names := unsigned(have); len(names) > 0 {
		certificates.Trouble = "trustd has not signed these certificates: " + strings.Join(names, ", ")
	}
	quorum := &controlv1.Condition{Name: "quorum", Help: "bhctl get nodes", Explains: true, Needs: []string{"networkd/address", "etcdd/certificates"}}
	if here := have.Voters - len(have.Silent); have.Running && !have.Ready && have.Voters > 0 && here < have.Voters/2+1 {
		quorum.Trouble = fmt.Sprintf("etcd has no quorum: of %d voters %d must answer, and %d do; silent: %s", have.Voters, have.Voters/2+1, here, strings.Join(have.Silent, ", "))
	}
	member := &controlv1.Condition{Name: "member", Trouble: memberTrouble(have), Help: "bhctl etcd status", Explains: true,
		Needs: []string{"storaged/VAR.mounted", "storaged/VAR.room", "trustd/bootstrap", "etcdd/certificates", "etcdd/certificate", "etcdd/quorum", "networkd/address"}}
	return []*controlv1.Condition{certificates, member, quorum, snapshots}
}

// memberTrouble says why the member does not answer; "" if it does.
func memberTrouble(have State) string {
	switch {
	case have.Ready, have.Held: // those who call it notice nothing
		return ""
	case have.Phase == left || have.Phase == removed:
		return "the member of this node is no more: it was told to leave, or was removed; bhctl etcd rejoin makes it one again"
	case have.Learner:
		return "the etcd member of this node is only joining"
	case have.Running:
		return "the etcd member runs, but has no leader that answers"
	}
	return "the etcd member does not run"
}

// unsigned are the profiles without a certificate; none before there is an authority.
func unsigned(have State) (names []string) {
	if !have.Bootstrapped {
		return nil
	}
	for _, f := range files {
		if f.profile != "" && have.Want[f.name] == "" {
			names = append(names, f.profile)
		}
	}
	for _, c := range clients {
		if have.Want[c] == "" {
			names = append(names, c)
		}
	}
	slices.Sort(names)
	return names
}
