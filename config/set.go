package config

import (
	"net/netip"
	"reflect"
)

// Kinds returns the kinds there are, in the order in which they are written. The slice is the caller's.
func Kinds() []Kind {
	return []Kind{KindMachine, KindNetwork, KindStorage, KindCluster, KindKubernetes, KindUpdate, KindAccess}
}

func kindNames() []string {
	var out []string
	for _, k := range Kinds() {
		out = append(out, string(k))
	}
	return out
}

// slot returns the set's field for a kind, a pointer; invalid if there is no such kind.
func (s *Set) slot(k Kind) reflect.Value { return reflect.ValueOf(s).Elem().FieldByName(string(k)) }

// Defaults returns the set that an empty text gives. It is the caller's.
func Defaults() Set {
	var s Set
	s.fill()
	return s
}

// fill puts the default into every field that has none and that can be known without looking at the node.
// Machine.hostname and Cluster.endpoint stay "": daemons find those out.
func (s *Set) fill() {
	for _, k := range Kinds() {
		if v := s.slot(k); v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
	}
	or(&s.Machine.Role, ControlPlane)
	for i := range s.Network.Firewall.Allow {
		or(&s.Network.Firewall.Allow[i].Protocol, "tcp")
	}
	or(&s.Storage.Disk, "system")
	or(&s.Storage.Filesystem, "ext4")
	or(&s.Storage.StateSize, 256<<20)
	or(&s.Storage.Encryption, EncryptionAuto)
	or(&s.Cluster.Name, "bulkhead")
	if sn := &s.Cluster.Etcd.Snapshots; sn.Every == nil {
		sn.Every = new(6)
	}
	or(&s.Cluster.Etcd.Snapshots.Keep, 5)
	k := s.Kubernetes
	or(&k.PodSubnet, netip.MustParsePrefix("10.244.0.0/16"))
	or(&k.ServiceSubnet, netip.MustParsePrefix("10.96.0.0/16"))
	or(&k.Domain, "cluster.local")
	or(&k.CNI, "bridge")
	if k.Schedulable == nil {
		yes := true
		k.Schedulable = &yes
	}
	or(&k.PodSecurity, "baseline")
	if len(s.Update.Health) == 0 {
		s.Update.Health = []Proof{ProofAPI, ProofServices, ProofConfig, ProofKubelet}
		if s.Machine.Role != Worker {
			s.Update.Health = append(s.Update.Health, ProofEtcd)
		}
	}
	or(&s.Update.Patience, 10)
	if o := &s.Access.OIDC; o.Wanted() {
		or(&o.Audience, o.ClientID)
		or(&o.UsernameClaim, "sub")
		or(&o.GroupsClaim, "groups")
		or(&o.UsernamePrefix, "oidc:")
		or(&o.GroupsPrefix, "oidc:")
	}
}

// or gives a field its default.
func or[T comparable](field *T, standard T) {
	var zero T
	if *field == zero {
		*field = standard
	}
}
