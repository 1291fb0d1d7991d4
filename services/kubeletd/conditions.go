package kubeletd

import (
	"slices"
	"strings"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// references are what rules wait for, where others bring it.
var references = map[string][]string{
	"volume VAR": {"storaged/VAR.mounted", "storaged/VAR.room"},
	"bootstrap":  {"trustd/bootstrap"},
	"address":    {"networkd/address"},
	"etcd":       {"etcdd/member"},
	"node":       {"kubeletd/kubelet"},
	"addon rbac": {"kubeletd/kube-apiserver"},
	"hostname":   {"machined/config"},
}

// apiCondition is whether an API server of the cluster answers. On a control plane it is the unit's, which may be well without: then another node's is away.
const apiCondition = "api"

// conditions say what of Kubernetes is not well and what it waits for. They only explain why the node has not converged. It is pure.
func conditions(want spec, have State) []*controlv1.Condition {
	if have.Absent {
		return nil
	}
	var out []*controlv1.Condition
	add := func(name, trouble, help string, needs ...string) {
		slices.Sort(needs)
		out = append(out, &controlv1.Condition{Name: name, Trouble: trouble, Help: help, Needs: slices.Compact(needs), Explains: true})
	}
	keys := []string{"trustd/answers", "trustd/converged", "trustd/bootstrap", "trustd/keys", "trustd/certificate"}
	add("certificates", missing(want, have), "bhctl get certificates", keys...)
	members := ""
	if want.Role == config.ControlPlane && have.Trust.Bootstrapped && len(have.Members) == 0 {
		members = waiting("members", want, have).Error()
	}
	add("members", members, "bhctl get members", keys...)
	api := ""
	if want.Role == config.Worker && !have.API {
		api = "no API server of the cluster answers: " + have.Trouble
	}
	add(apiCondition, api, "bhctl get nodes", "networkd/address", "kubeletd/certificates")
	for _, r := range rules {
		if want.Role == config.Worker && !r.worker {
			continue
		}
		needs := []string{"kubeletd/certificates", "kubeletd/certificate"}
		for _, what := range r.after {
			switch refs, ok := references[what]; {
			case ok:
				needs = append(needs, refs...)
			case what == "kube-apiserver" && want.Role == config.Worker:
				needs = append(needs, "kubeletd/"+apiCondition)
			default:
				needs = append(needs, "kubeletd/"+what)
			}
		}
		add(r.unit, component(r, want, have), "bhctl logs "+r.unit, needs...)
	}
	add("node", nodeTrouble(want, have), "bhctl get components", "kubeletd/kubelet", "kubeletd/kube-apiserver", "kubeletd/"+apiCondition, "kubeletd/members")
	slices.SortFunc(out, func(a, b *controlv1.Condition) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// missing names the certificates that files wait for.
func missing(want spec, have State) string {
	files, err := render(want, have)
	if err != nil {
		return errs.Text(err)
	}
	var names []string
	for _, f := range files {
		if f.digest(have.Pairs) == "" && !slices.Contains(names, f.Profile) {
			names = append(names, f.Profile)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return "trustd has not signed these certificates: " + strings.Join(names, ", ")
}

// component says why a unit does not do its work; "" if it does.
func component(r rule, want spec, have State) string {
	u := have.Units[r.unit]
	h, asked := have.Health[r.unit]
	switch {
	case r.once && have.loaded(r.unit):
		return ""
	case u.State == "up" && !r.once && (!asked || h == ""):
		return ""
	case u.State == "" || u.State == "down" && u.LastExit != ended:
		p := planner{want: want, have: have}
		var wait []string
		for _, what := range r.after {
			if !p.reached(what) {
				wait = append(wait, p.named(what))
			}
		}
		if len(wait) > 0 {
			return r.unit + " is not started yet: it waits for " + strings.Join(wait, ", ")
		}
		return r.unit + " is not started yet"
	}
	return r.unit + ": " + errs.Text(waiting(r.unit, want, have))
}

// nodeTrouble says why Kubernetes has no Ready node here.
func nodeTrouble(want spec, have State) string {
	switch {
	case have.Node != nil && have.Node.Ready:
		return ""
	case !have.API:
		return "whether the node is Ready is not known: no API server answers"
	}
	return "the node is not Ready: " + errs.Text(waiting("node Ready", want, have))
}
