package roster

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

var now = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

func TestAdmit(t *testing.T) {
	unused := Token{ID: "T", Role: Worker, Expires: now.Add(time.Minute), State: Unused}
	with := func(f func(*Token)) Token { c := unused; f(&c); return c }
	used := with(func(t *Token) { t.State, t.UsedBy, t.Key = Used, "n2", "K2" })
	n2 := Node{Name: "n2", Role: Worker, Key: "K2"}
	for _, c := range []struct {
		name    string
		token   Token
		nodes   []Node
		removed string
		by      Applicant
		now     time.Time
		changed bool
		err     string
		kind    errs.Kind
	}{
		{name: "new", token: unused, by: Applicant{Token: "T", Name: "n2", Key: "K2", Address: "10.5.0.2"}, changed: true},
		{name: "named as the token", token: with(func(t *Token) { t.Name = "n2" }), by: Applicant{Token: "T", Name: "n2", Key: "K2"}, changed: true},
		{name: "again, the answer was lost", token: used, nodes: []Node{n2}, by: Applicant{Token: "T", Name: "n2", Key: "K2"}},
		{name: "unknown token", token: unused, by: Applicant{Token: "U", Name: "n2", Key: "K2"}, err: "does not know it", kind: errs.Unauthenticated},
		{name: "expired", token: unused, by: Applicant{Token: "T", Name: "n2", Key: "K2"}, now: now.Add(time.Minute), err: "expired at 2026-11-26T12:01:00Z; it is 2026-11-26T12:01:00Z here", kind: errs.Unauthenticated},
		{name: "revoked", token: with(func(t *Token) { t.State = Revoked }), by: Applicant{Token: "T", Name: "n2", Key: "K2"}, err: "was revoked", kind: errs.Unauthenticated},
		{name: "used by another key", token: used, nodes: []Node{n2}, by: Applicant{Token: "T", Name: "n2", Key: "K3"}, err: `used by node "n2"`, kind: errs.Unauthenticated},
		{name: "used, under another name", token: used, nodes: []Node{n2}, by: Applicant{Token: "T", Name: "n3", Key: "K2"}, err: `used by node "n2"`, kind: errs.Unauthenticated},
		{name: "used, and removed since", token: used, removed: "K2", by: Applicant{Token: "T", Name: "n2", Key: "K2"}, err: "removed since", kind: errs.Unauthenticated},
		{name: "used, removed, and expired", token: used, by: Applicant{Token: "T", Name: "n2", Key: "K2"}, now: now.Add(time.Hour), err: "expired", kind: errs.Unauthenticated},
		{name: "token for another name", token: with(func(t *Token) { t.Name = "n9" }), by: Applicant{Token: "T", Name: "n2", Key: "K2"}, err: `called "n9", not "n2"`, kind: errs.Denied},
		{name: "name taken", token: unused, nodes: []Node{n2}, by: Applicant{Token: "T", Name: "n2", Key: "K3"}, err: `has a node called "n2"`, kind: errs.Exists},
		{name: "the same machine again, under another name", token: unused, nodes: []Node{n2}, by: Applicant{Token: "T", Name: "n3", Key: "K2"}, err: `node "n2" of the cluster already`, kind: errs.Exists},
		{name: "a key that was removed", token: unused, removed: "K2", by: Applicant{Token: "T", Name: "n2", Key: "K2"}, err: "removed from the cluster", kind: errs.Denied},
	} {
		s := &State{Tokens: map[string]Token{"T": c.token}, Nodes: map[string]Node{}, Removed: map[string]string{c.removed: "n2"}}
		for _, n := range c.nodes {
			s.Nodes[n.Name] = n
		}
		if c.now.IsZero() {
			c.now = now
		}
		n, tok, changed, err := Admit(s, c.by, c.now)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || errs.Of(err) != c.kind {
				t.Errorf("%s: %v (kind %d), want kind %d with %q", c.name, err, errs.Of(err), c.kind, c.err)
			}
			continue
		}
		if err != nil || changed != c.changed || n.Name != "n2" || n.Role != Worker || n.Key != "K2" || tok.State != Used || tok.UsedBy != "n2" || tok.Key != "K2" {
			t.Errorf("%s: %+v, %+v, %v, %v", c.name, n, tok, changed, err)
		}
	}
}

func TestOwn(t *testing.T) {
	me := Node{Name: "n1", Role: ControlPlane, Key: "K1", Joined: now}
	there := Node{Name: "n1", Role: ControlPlane, Key: "K1", Joined: now.Add(-time.Hour), Instance: "i", Addresses: []string{"10.5.0.1"}}
	former := there
	former.Name = "old"
	doubled := there
	doubled.Instance, doubled.Former = "j", []string{"i"}
	for _, c := range []struct {
		name      string
		nodes     []Node
		removed   string
		addresses []string
		want      string // of what is written
		drop      int
		err       string
	}{
		{name: "new", addresses: []string{"10.5.0.1"}, want: "n1 [10.5.0.1] 12:00"},
		{name: "there", nodes: []Node{there}, addresses: []string{"10.5.0.1"}},
		{name: "another address", nodes: []Node{there}, addresses: []string{"10.5.0.1", "10.5.0.9"}, want: "n1 [10.5.0.9 10.5.0.1] 11:00"},
		{name: "another name", nodes: []Node{former}, addresses: []string{"10.5.0.1"}, want: "n1 [10.5.0.1] 11:00", drop: 1},
		{name: "somebody else's name", nodes: []Node{{Name: "n1", Key: "K2"}}, err: "another node called"},
		{name: "removed", removed: "K1", err: "was removed"},
		{name: "a copy runs", nodes: []Node{doubled}, err: "another machine runs"},
	} {
		s := &State{Nodes: map[string]Node{}, Removed: map[string]string{c.removed: "n1"}}
		for _, n := range c.nodes {
			s.Nodes[n.Name] = n
		}
		w, drop, err := Own(s, me, "i", c.addresses)
		got := ""
		if w.Name != "" {
			got = fmt.Sprintf("%s %v %s", w.Name, w.Addresses, w.Joined.Format("15:04"))
		}
		if got != c.want || len(drop) != c.drop || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, drop %d, %v; want %q, %d, %q", c.name, got, len(drop), err, c.want, c.drop, c.err)
		}
	}
}

// A run of trustd that comes back after another one is a second machine.
func TestMeet(t *testing.T) {
	n := Node{Name: "n3"}
	for i, c := range []struct {
		instance, address string
		changed           bool
		denied            bool
	}{
		{"a", "10.5.0.3", true, false},
		{"a", "10.5.0.3", false, false},
		{"a", "10.5.0.4", true, false},
		{"b", "10.5.0.3", true, false},
		{"a", "10.5.0.4", false, true},
		{"b", "10.5.0.3", false, false},
		{"c", "", true, false},
		{"b", "10.5.0.3", false, true},
	} {
		after, changed, err := n.Meet(c.instance, c.address)
		if changed != c.changed || errs.Is(err, errs.Denied) != c.denied {
			t.Errorf("%d: %s from %q: changed %v, %v", i, c.instance, c.address, changed, err)
		}
		n = after
	}
	for i := range 2 * max(MaxAddresses, maxFormer) {
		n, _, _ = n.Meet(fmt.Sprint(i), fmt.Sprintf("10.6.0.%d", i))
	}
	if len(n.Addresses) != MaxAddresses || len(n.Former) != maxFormer || n.Addresses[0] != "10.6.0.31" || n.Former[0] != "30" {
		t.Errorf("kept %v and %v", n.Addresses, n.Former)
	}
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{"10.5.0.3": "10.5.0.3", "::ffff:10.5.0.3": "10.5.0.3", "fd00::3": "fd00::3", "127.0.0.1": "", "::1": "", "fe80::1%eth0": "", "0.0.0.0": "", "ff02::1": ""} {
		if got, err := Address(in); got != want || err != nil {
			t.Errorf("%s: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "n3", "10.5.0.3:50000"} {
		if _, err := Address(in); err == nil {
			t.Errorf("%q is an address", in)
		}
	}
}

// An address that several nodes have is no way to one of them.
func TestCluster(t *testing.T) {
	s := &State{Nodes: map[string]Node{
		"n2": {Name: "n2", Role: Worker, Addresses: []string{"10.0.2.15"}},
		"n1": {Name: "n1", Role: ControlPlane, Addresses: []string{"10.0.2.15", "10.5.0.1"}},
	}}
	var got []string
	for _, n := range s.Cluster() {
		got = append(got, fmt.Sprint(n.GetName(), n.GetAddresses()))
	}
	if want := []string{"n1[10.5.0.1]", "n2[10.0.2.15]"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// What cannot be read in etcd does not spoil the rest, and a removal that cannot be read is one.
func TestParse(t *testing.T) {
	s := parse(map[string]*storev1.Entry{
		nodes + "n1":     {Value: []byte(`{"role":"worker","key":"K1"}`), Revision: 7},
		nodes + "n2":     {Value: []byte(`{`)},
		tokens + "T":     {Value: []byte(`{"state":"used"}`)},
		revoked + "b":    {Value: []byte(`{}`)},
		revoked + "a":    {},
		removed + "K9":   {Value: []byte(`x`)},
		Prefix + "other": {Value: []byte(`x`)},
	})
	if len(s.Nodes) != 1 || s.Nodes["n1"].revision != 7 || s.Tokens["T"].State != Used || !slices.Equal(s.Revoked, []string{"a", "b"}) || len(s.Strange) != 2 {
		t.Errorf("%+v", s)
	}
	if _, gone := s.Removed["K9"]; !gone {
		t.Error("a removal that cannot be read does not count")
	}
}

// A thousand nodes with all the addresses and runs that are kept fit into one answer of the store (3 MiB), twice.
func TestThousandNodes(t *testing.T) {
	n := Node{Role: ControlPlane, Key: strings.Repeat("f", 64), PublicKey: make([]byte, 91), Joined: now, Token: "7F3KQM2X9T"}
	for i := range MaxAddresses + maxFormer {
		n, _, _ = n.Meet(fmt.Sprintf("%032x", i), fmt.Sprintf("2001:db8:aaaa:bbbb:cccc:dddd:eeee:%04x", 0x1000+i))
	}
	data, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	if len(data)*1000*2 > 3<<20 {
		t.Errorf("a record can have %d bytes", len(data))
	}
}
