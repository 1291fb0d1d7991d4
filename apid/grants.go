package apid

import (
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// grants is what the document says about who may do what. It is never changed once it is made; nil grants nothing.
type grants struct {
	roles         map[string]*custom
	users, groups map[string][]string // roles of people who signed in at the issuer
	issuer        *issuer             // nil: there is none
}

// custom is a role that the document makes.
type custom struct {
	name    string
	methods map[string]bool // full names, as routes have them
	nodes   config.NodeSelector
}

// maxCustom bounds the custom roles of one caller.
const maxCustom = 16

// newGrants reads the document; nil if it says nothing about it.
func newGrants(a *config.Access) *grants {
	if len(a.Roles) == 0 && !a.OIDC.Wanted() {
		return nil
	}
	g := &grants{roles: map[string]*custom{}, users: map[string][]string{}, groups: map[string][]string{}}
	for _, r := range a.Roles {
		c := &custom{name: r.Name, methods: map[string]bool{}, nodes: r.Nodes}
		for _, m := range r.Methods() {
			c.methods["/"+m] = true
		}
		g.roles[r.Name] = c
	}
	for _, b := range a.Bindings {
		for _, u := range b.Users {
			g.users[u] = append(g.users[u], b.Role)
		}
		for _, n := range b.Groups {
			g.groups[n] = append(g.groups[n], b.Role)
		}
	}
	if a.OIDC.Wanted() {
		g.issuer = newIssuer(a.OIDC)
	}
	return g
}

// keep takes over what was learnt of the issuer, if it is the same.
func (g *grants) keep(old *grants) {
	if g != nil && old != nil && g.issuer != nil && old.issuer != nil && g.issuer.config == old.issuer.config {
		g.issuer = old.issuer
	}
}

// resolve gives an identity the roles that count now: those of the document among its own and, for who signed in at the issuer, those of its bindings.
// What its credentials say of themselves about roles is nothing to an issuer.
func (g *grants) resolve(who *identity) {
	if who.how == howIssuer && g != nil {
		all := slices.Clone(g.users[who.name])
		for _, n := range who.groups {
			all = append(all, g.groups[n]...)
		}
		who.roles, who.custom = known(all), unknown(all)
	}
	own := who.custom
	who.custom = nil
	if g == nil || len(own) == 0 {
		return
	}
	who.roles = slices.Clone(who.roles) // another call may be reading them
	for _, name := range own {
		if c := g.roles[name]; c != nil {
			who.may = append(who.may, c)
			who.roles = append(who.roles, name)
		}
	}
}

// unknown returns the names, each once, that are no role of ours and may be one of the document's.
func unknown(roles []string) []string {
	var out []string
	for _, r := range roles {
		if r != "" && len(r) <= 63 && !slices.Contains(personal, r) && !nodeRole(r) && !slices.Contains(out, r) && len(out) < maxCustom {
			out = append(out, r)
		}
	}
	return out
}

// mayCall reports whether a role of the document lets the caller call a method somewhere.
func (id identity) mayCall(r *route) bool {
	return slices.ContainsFunc(id.may, func(c *custom) bool { return c.methods[r.name()] })
}

// onNode decides whether a caller who was let in because of a role of the document has it on the node that answers. It is pure.
func onNode(c *call, name, role string) error {
	if holds(c.who.roles, c.route.need) || !c.who.mayCall(c.route) {
		return nil // let in by something else, which counts everywhere
	}
	var of []string
	for _, m := range c.who.may {
		if m.methods[c.route.name()] {
			if m.nodes.Has(name, config.Role(role)) {
				return nil
			}
			of = append(of, m.name)
		}
	}
	return errs.New(errs.Denied, "%q may not call %s on node %q: role %s is for other nodes", c.who.name, c.route.name(), name, strings.Join(of, " and "))
}
