package trustd

import (
	"crypto/rand"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

var allAuthorities = []string{"etcd", "front-proxy", "kubernetes", "os"}

// keysOf says which generation signs and which are trusted besides, and which keys for tokens count.
func keysOf(k *keyring) string {
	var out []string
	for _, a := range k.authorities() {
		text := a.name + " " + string(rune('0'+generation(a.cert)))
		if o := k.other(a); o != nil {
			text += "+" + string(rune('0'+generation(o.cert)))
		}
		out = append(out, text)
	}
	for _, keys := range [][]key{k.tokens, k.cluster.accounts} {
		var ids []string
		for _, t := range keys {
			ids = append(ids, t.id)
		}
		out = append(out, strings.Join(ids, "+"))
	}
	return strings.Join(append(out, string(k.cluster.joinKey[:4])), ", ")
}

// Whenever the power fails, the node comes up with the keys of before or of after, whole: the files are written one after the other, so each mixture that can be there is read.
func TestRotationSurvivesPowerCuts(t *testing.T) {
	k, identity, err := newIdentity(rand.Reader, time.Now())
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(err)
	var cluster []byte
	k.cluster, cluster, err = newCluster(rand.Reader, time.Now())
	must(err)
	r, err := newRotation("0a", allAuthorities, k, rand.Reader, time.Now())
	must(err)
	after := k.turned(r.at(roster.Finish))
	newIdentityFile, err := after.identity()
	must(err)
	newClusterFile, err := after.cluster.disk()
	must(err)
	read := func(files map[string][]byte) string {
		t.Helper()
		dir := t.TempDir()
		for name, data := range files {
			must(os.WriteFile(filepath.Join(dir, name), data, 0o600))
		}
		got, err := readKeyring(dir)
		must(err)
		return keysOf(got)
	}
	file := func(r *rotation) []byte {
		t.Helper()
		data, err := r.disk()
		must(err)
		return data
	}
	old, fresh := keysOf(k), keysOf(after)
	for name := range authorityNames {
		if !strings.Contains(fresh, authorityNames[name]+" 2,") {
			t.Errorf("%s is not replaced: %s", name, fresh)
		}
	}
	both, issue := keysOf(k.turned(r)), keysOf(k.turned(r.at(roster.Issue)))
	for _, c := range []struct {
		stage string
		base  [][2][]byte // identity and cluster, as far as the writing has got
		want  string
	}{
		{roster.Prepare, [][2][]byte{{identity, cluster}}, both},
		{roster.Issue, [][2][]byte{{identity, cluster}}, issue},
		{roster.Abort, [][2][]byte{{identity, cluster}}, both},
		{roster.Finish, [][2][]byte{{identity, cluster}, {newIdentityFile, cluster}, {newIdentityFile, newClusterFile}}, fresh},
		{roster.Aborted, [][2][]byte{{identity, cluster}}, old},
	} {
		for i, b := range c.base {
			if got := read(map[string][]byte{identityFile: b[0], clusterFile: b[1], rotationFile: file(r.at(c.stage))}); got != c.want {
				t.Errorf("%s, %d files written: %s\nwant %s", c.stage, i, got, c.want)
			}
		}
	}
	if got := read(map[string][]byte{identityFile: newIdentityFile, clusterFile: newClusterFile, rotationFile: file(r.at(roster.Finish).spent())}); got != fresh {
		t.Errorf("after the end: %s\nwant %s", got, fresh)
	}
	// An older image does not know the file, and goes on with what it knows, which is trusted until the end.
	if got := read(map[string][]byte{identityFile: identity, clusterFile: cluster}); got != old {
		t.Errorf("an older image: %s\nwant %s", got, old)
	}
	for name, text := range map[string]string{"no JSON": "{", "another version": `{"version":2,"id":"a","stage":"issue"}`, "no stage": `{"version":1,"id":"a","stage":"x"}`, "no keys": `{"version":1,"id":"a","stage":"issue"}`} {
		if _, err := parseRotation([]byte(text)); err == nil {
			t.Errorf("%s: read", name)
		}
	}
	if text := string(file(r.at(roster.Finish).spent())); strings.Contains(text, "PRIVATE") {
		t.Errorf("keys are left: %s", text)
	}
}

// authorities is a box's service for administrators.
func (b *box) authorities() trustv1.AuthoritiesClient {
	return trustv1.NewAuthoritiesClient(b.conn[uid.Apid])
}

// stage waits until the node itself is at a stage.
func (b *box) stage(stage string) *trustv1.TrustState {
	b.t.Helper()
	return b.until("came to "+stage, func(s *trustv1.TrustState) bool { return s.GetRotation().GetStage() == stage })
}

// The keys of the new authorities go to control planes of the list alone, and are in etcd in no form that others can read.
func TestNewKeysAreSealed(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n1.knows("n1", "n2", "n3")
	n2.knows("n1", "n2", "n3")
	n3.knows("n1", "n2", "n3")
	n3.stop() // it blocks
	_, err := n1.authorities().StartRotation(n1.admin(), &trustv1.StartRotationRequest{Which: []string{"os"}, SkipWait: true})
	n1.must(err)
	n2.stage("prepare")
	for s, changed := n1.d.list.Get(); len(s.Sealed) > 0 || len(s.Wants) > 0; s, changed = n1.d.list.Get() { // until n2 has taken them
		<-changed
	}
	k1, _ := n1.d.keys.Get()
	k2, _ := n2.d.keys.Get()
	if a, b := k1.rot.turns["os-ca"].new, k2.rot.turns["os-ca"].new; !a.cert.Equal(b.cert) || !a.key.Equal(b.key) {
		t.Error("the control planes have different new authorities")
	}
	state := func() *roster.State { s, _ := n1.d.list.Get(); return s }
	id := state().Rotation.ID
	// A worker, whose key the list has, and somebody who can write into etcd.
	seal, err := join.NewSealKey()
	n1.must(err)
	m := n3.member()
	list, _, err := n1.d.roster()
	n1.must(err)
	ask := func(name string, w roster.Want) {
		t.Helper()
		w.Rotation, w.Seal = id, seal.PublicKey().Bytes()
		n1.must(list.Ask(t.Context(), name, w))
	}
	sig, err := join.SignWant(m.key, rand.Reader, id, "n3", seal.PublicKey().Bytes())
	n1.must(err)
	ask("n3", roster.Want{Signature: sig, Proof: wantProof(k1, id, "n3", seal.PublicKey().Bytes())})
	ask("n2", roster.Want{Signature: sig, Proof: wantProof(k1, id, "n2", seal.PublicKey().Bytes())})
	ask("n9", roster.Want{})
	sig, err = join.SignWant(n2.member().key, rand.Reader, id, "n2", seal.PublicKey().Bytes())
	n1.must(err)
	ask("n2", roster.Want{Signature: sig, Proof: make([]byte, 32)}) // the node's key, but none of the cluster's
	s, err := list.Read(t.Context())
	n1.must(err)
	n1.must(n1.d.give(t.Context(), s, k1))
	n2.must(n2.d.give(t.Context(), s, k2))
	if s, err = list.Read(t.Context()); err != nil || len(s.Sealed) > 0 {
		t.Errorf("keys were given to %v, %v", slices.Collect(maps.Keys(s.Sealed)), err)
	}
	l.mu.Lock()
	for key, e := range l.data {
		if strings.Contains(string(e.GetValue()), "PRIVATE") || strings.Contains(string(e.GetValue()), "BEGIN") {
			t.Errorf("%s has a key: %s", key, e.GetValue())
		}
	}
	l.mu.Unlock()

	// A forged answer is not taken, whoever wrote it.
	plain, err := json.Marshal(rotationOnDisk{Version: fileVersion, ID: id, Stage: roster.Issue})
	n1.must(err)
	n2.d.rotating.Lock()
	n2.d.wantKey = seal
	n2.d.rotating.Unlock()
	text, err := join.Seal(seal.PublicKey().Bytes(), sealLabel(id), plain)
	n1.must(err)
	if _, err := n2.d.open(k2, roster.Sealed{Rotation: id, Text: text, Signature: sig}, id); err == nil {
		t.Error("a forged answer was taken")
	}

	lostWorker(t, n1, n2, k1)
}

// lostWorker: the worker that is away is named, and removing it lets the rest go on.
func lostWorker(t *testing.T, n1, n2 *box, k1 *keyring) {
	r, err := n2.authorities().GetRotation(n2.admin(), &trustv1.GetRotationRequest{})
	n2.must(err)
	if !slices.Contains(r.GetWaiting(), "n3") || r.GetStage() != "prepare" {
		t.Errorf("while a node is away: %v", r)
	}
	_, err = n2.authorities().StartRotation(n2.admin(), &trustv1.StartRotationRequest{Which: []string{"x"}})
	if !errs.Is(err, errs.Invalid) {
		t.Errorf("no such authority: %v", err)
	}
	_, err = n1.membership().RemoveMember(n1.admin(), &trustv1.RemoveMemberRequest{Name: "n3"})
	n1.must(err)
	n1.stage("finish")
	n2.stage("finish")
	if got := n1.until("was done", func(s *trustv1.TrustState) bool { return strings.Count(s.GetOsCa(), "BEGIN") == 1 }); strings.Contains(got.GetOsCa(), string(k1.os.pem)) {
		t.Error("the old authority is still trusted")
	}
	// What the former members have is worth nothing: keys for tokens and for joining are others, too.
	now, _ := n1.d.keys.Get()
	if now.tokens[0].id == k1.tokens[0].id || len(now.tokens) != 1 || string(now.cluster.joinKey) == string(k1.cluster.joinKey) {
		t.Error("token and join keys were not replaced")
	}
}

// A daemon that does not act by the new authorities holds the next stage up, and is named.
func TestRotationWaitsForDaemons(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	signer := trustv1.NewSignerClient(n1.conn[uid.Etcdd])
	watch, err := signer.WatchTrust(t.Context(), &trustv1.WatchTrustRequest{})
	n1.must(err)
	_, err = watch.Recv()
	n1.must(err)
	_, err = n1.authorities().StartRotation(n1.admin(), &trustv1.StartRotationRequest{Which: []string{"os"}, SkipWait: true})
	n1.must(err)
	s := n1.stage("prepare")
	if err := n1.d.ears.heard(s, time.Now()); err == nil || !strings.Contains(err.Error(), `["etcdd"]`) {
		t.Errorf("while etcdd has said nothing: %v", err)
	}
	report := func(s *trustv1.TrustState, authority string) {
		t.Helper()
		_, err := signer.ReportTrust(t.Context(), &trustv1.ReportTrustRequest{Authorities: s.GetAuthorities(), Held: []*trustv1.HeldCertificate{{Profile: "x", Authority: authority}}})
		n1.must(err)
	}
	k, _ := n1.d.keys.Get()
	turn := k.rot.turns["os-ca"]
	report(s, pemSum(turn.old.pem))
	s = n1.stage("issue")
	report(s, pemSum(turn.old.pem))
	if err := n1.d.ears.heard(s, time.Now()); err == nil {
		t.Error("a certificate of the old authority is enough")
	}
	report(s, pemSum(turn.new.pem))
	report(n1.stage("finish"), pemSum(turn.new.pem))
	n1.until("was done", func(s *trustv1.TrustState) bool { return strings.Count(s.GetOsCa(), "BEGIN") == 1 })
}
