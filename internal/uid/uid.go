// Package uid is the one list of user ids on a node. A user is also its own group of the same number.
//
// It may be imported by everybody, PID 1 too, and must import nothing.
package uid

// ID is a numeric user id, as setuid(2) takes it and SO_PEERCRED reports it.
type ID uint32

// The users of a node. Numbers are written into file systems: they are never changed and never used again.
const (
	Root              ID = 0
	Machined          ID = 101
	Apid              ID = 102
	Gateway           ID = 103
	Networkd          ID = 104
	Trustd            ID = 105
	Storaged          ID = 106
	Timed             ID = 107
	Updated           ID = 108
	Etcdd             ID = 109
	Kubeletd          ID = 110
	KubeAPIServer     ID = 120
	KubeControllerMgr ID = 121
	KubeScheduler     ID = 122
)

// byName is in the order of the numbers, so that lists made from it are stable.
var byName = []struct {
	name string
	id   ID
}{
	{"root", Root}, {"machined", Machined}, {"apid", Apid}, {"gateway", Gateway}, {"networkd", Networkd},
	{"trustd", Trustd}, {"storaged", Storaged}, {"timed", Timed}, {"updated", Updated}, {"etcdd", Etcdd},
	{"kubeletd", Kubeletd}, {"kube-apiserver", KubeAPIServer}, {"kube-controller-manager", KubeControllerMgr},
	{"kube-scheduler", KubeScheduler},
}

// Lookup returns the id of a user's name; ok is false if there is no such user.
func Lookup(name string) (id ID, ok bool) {
	for _, e := range byName {
		if e.name == name {
			return e.id, true
		}
	}
	return 0, false
}

// Name returns the user's name, or "" if the id belongs to nobody.
func (id ID) Name() string {
	for _, e := range byName {
		if e.id == id {
			return e.name
		}
	}
	return ""
}

// Names returns every user's name in the order of their ids. The slice is the caller's.
func Names() []string {
	out := make([]string, len(byName))
	for i, e := range byName {
		out[i] = e.name
	}
	return out
}
