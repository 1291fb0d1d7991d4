package trustd

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// rotate does this node's part of replacing authorities until ctx is done: what the record in etcd says, on a worker what a control plane says. It looks at what is
// there, not at what happened, so that it may stop anywhere and begin anew.
func (d *Daemon) rotate(ctx context.Context) error {
	pause, said, told := firstPause, "", ""
	for {
		list, c1 := d.list.Get()
		k, c2 := d.keys.Get()
		trust, c3 := d.trust.Get()
		_, c4 := d.ears.changed.Get()
		var at time.Time
		var err error
		switch {
		case k.worker():
			told, err = d.rotateWorker(ctx, k, trust, told)
		case k.cluster != nil && list != nil && k.node != nil:
			at, err = d.rotateControlPlane(ctx, list, k, trust)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		text := errs.Text(err)
		if err != nil {
			at, pause = d.cfg.Now().Add(pause), min(2*pause, maxPause)
		} else {
			pause = firstPause
		}
		if err == nil {
			said = ""
		} else if text != said && pause > waitsLong { // what passes by itself is no news
			d.log.Warn("replacement of authorities waits", "err", text)
			said = text
		}
		var timer <-chan time.Time
		if !at.IsZero() {
			timer = time.After(min(max(at.Sub(d.cfg.Now()), firstPause), time.Hour))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c1:
		case <-c2:
		case <-c3:
		case <-c4:
		case <-timer:
		}
	}
}

// waitsLong is the pause between two tries from which on it is said why.
const waitsLong = 2 * time.Second

// rotateWorker confirms what a worker heard, once its daemons act by it. told is what was confirmed last.
func (d *Daemon) rotateWorker(ctx context.Context, k *keyring, t *trustv1.TrustState, told string) (string, error) {
	s := t.GetRotation()
	now := s.GetId() + " " + s.GetStage()
	if s == nil || now == told {
		return told, nil
	}
	if !d.keeps(t) {
		return told, errs.New(errs.Unavailable, "what was heard of the cluster is not on the disk yet")
	}
	if err := d.ears.heard(t, d.cfg.Now()); err != nil {
		return told, err
	}
	roots := d.osRoots(k)
	err := d.far(ctx, k, func(endpoint string) error {
		return d.call(ctx, trustv1.Nodes_ConfirmRotation_FullMethodName, endpoint, roots, join.NodeLabel, func(binding []byte) (proto.Message, error) {
			proof, err := d.prove(k.node, binding, join.RotationPayload(d.instance, s.GetId(), s.GetStage()))
			return &trustv1.ConfirmRotationRequest{Proof: proof, Done: s}, err
		}, &trustv1.ConfirmRotationResponse{})
	})
	if err != nil {
		return told, err
	}
	return now, nil
}

// rotateControlPlane does what is to be done now, and says when to look again if nothing happens.
func (d *Daemon) rotateControlPlane(ctx context.Context, list *roster.State, k *keyring, t *trustv1.TrustState) (at time.Time, err error) {
	d.rotating.Lock()
	defer d.rotating.Unlock()
	if now, _ := d.keys.Get(); now != k {
		return at, nil // it is looked at again at once
	}
	r := list.Rotation
	if k.rot != nil && k.rot.final() && len(k.rot.turns) > 0 { // the power failed meanwhile
		return at, d.conclude()
	}
	if k.rot != nil && !k.rot.final() && (r == nil || r.ID != k.rot.id) {
		return at, d.orphan(ctx, k)
	}
	if r == nil {
		return at, nil
	}
	if k.rot == nil || k.rot.id != r.ID {
		return at, d.takePart(ctx, list, k)
	}
	stage := map[string]string{roster.Done: roster.Finish}[r.Stage]
	if stage == "" {
		stage = r.Stage
	}
	if stage != k.rot.stage && !k.rot.final() {
		return at, d.enter(k.rot.at(stage))
	} else if stage != k.rot.stage {
		return at, d.ahead(ctx, k.rot)
	}
	if len(k.rot.turns) > 0 {
		if err := d.give(ctx, list, k); err != nil {
			return at, err
		}
	}
	if r.Over() {
		return at, nil
	}
	me := list.Nodes[k.node.name]
	if me.Key == k.node.digest() && !list.HasConfirmed(me.Name) && k.rot.stage == r.Stage {
		if err := d.ears.heard(t, d.cfg.Now()); err != nil {
			return at, err
		}
		l, _, err := d.roster()
		if err != nil {
			return at, err
		}
		return at, l.Confirm(ctx, me, r.ID, r.Stage)
	}
	next, at := roster.Advance(list, d.cfg.Now())
	if next == "" {
		return at, nil
	}
	l, _, err := d.roster()
	if err != nil {
		return at, err
	}
	return at, l.Enter(ctx, d.cfg.Now())
}

// enter goes to a stage: from the moment the file is there.
func (d *Daemon) enter(r *rotation) error {
	d.mu.Lock()
	if d.where != durable {
		d.mu.Unlock()
		return errs.New(errs.Unavailable, "volume STATE is not mounted; see the storage status")
	}
	k, _ := d.keys.Get()
	data, err := r.disk()
	if err == nil {
		err = writeFile(d.cfg.StateDir, rotationFile, data)
	}
	if err == nil {
		d.keys.Set(k.turned(r))
		d.publish()
		d.report()
		d.log.Info("replacement of authorities", "id", r.id, "stage", r.stage)
	}
	d.mu.Unlock()
	if err == nil && r.final() && len(r.turns) > 0 {
		err = d.conclude()
	}
	return err
}

// conclude brings the keys that count to where they belong, and forgets the others last: until then the file of the replacement says which count.
func (d *Daemon) conclude() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	k, _ := d.keys.Get()
	next := *k
	next.rot = k.rot.spent()
	files := map[string][]byte{}
	var err error
	if k.node != nil && !k.node.first {
		n := *k.node
		n.osCA = k.os.cert
		n.state = proto.CloneOf(n.state)
		n.state.OsCa, n.state.Rotation = string(k.os.pem), nil
		next.node = &n
		files[nodeFile], err = next.file(nil)
	} else {
		files[identityFile], err = k.identity()
		if err == nil {
			files[clusterFile], err = k.cluster.disk()
		}
	}
	if err != nil {
		return err
	}
	for _, name := range []string{nodeFile, identityFile, clusterFile} {
		if data, ok := files[name]; ok {
			if err := writeFile(d.cfg.StateDir, name, data); err != nil {
				return err
			}
		}
	}
	data, err := next.rot.disk()
	if err != nil {
		return err
	}
	if err := writeFile(d.cfg.StateDir, rotationFile, data); err != nil {
		return err
	}
	d.keys.Set(&next)
	d.publish()
	d.report()
	return nil
}

// orphan is for a replacement that this node has and the list in etcd has not: it was never made known, or is over since this node has last been there, or etcd was restored from an
// older snapshot.
func (d *Daemon) orphan(ctx context.Context, k *keyring) error {
	l, _, err := d.roster()
	if err != nil {
		return err
	}
	state, err := l.Read(ctx) // what is watched may lag behind
	if err != nil {
		return err
	}
	r := state.Rotation
	switch {
	case r != nil && r.ID == k.rot.id:
		return errs.New(errs.Unavailable, "the cluster's list of nodes is not heard yet")
	case !k.rot.fresh():
		return d.enter(k.rot.at(roster.Aborted))
	case !r.Over():
		return errs.New(errs.Conflict, "the cluster replaces its authorities (%s), but this node has not finished with the time before (%s): remove it, reset it and let it join anew", r.ID, k.rot.id)
	}
	rot := roster.Rotation{ID: k.rot.id, Stage: k.rot.stage, By: "restored", Started: d.cfg.Now(), Entered: d.cfg.Now(), Wait: uint64(overlap / time.Second)}
	for which, name := range authorityNames {
		if _, ok := k.rot.turns[name]; ok {
			rot.Which = append(rot.Which, which)
		}
	}
	slices.Sort(rot.Which)
	return l.Restore(ctx, rot)
}

// ahead tells the list in etcd that a replacement has come to its end, if it has forgotten that: an older snapshot was restored. There is no way back from there.
func (d *Daemon) ahead(ctx context.Context, r *rotation) error {
	l, _, err := d.roster()
	if err != nil {
		return err
	}
	return l.Change(ctx, func(_ *roster.State, rot *roster.Rotation) (bool, error) {
		if rot.ID != r.id || rot.Stage == r.stage || rot.Stage == roster.Done {
			return false, nil
		}
		rot.Stage, rot.Entered = r.stage, d.cfg.Now()
		return true, nil
	})
}

// takePart gets the new keys from another control plane. When the replacement is over there is nothing to get: the node has the right ones, or its own word is worth nothing.
func (d *Daemon) takePart(ctx context.Context, list *roster.State, k *keyring) error {
	r := list.Rotation
	switch r.Stage {
	case roster.Aborted, roster.Abort: // it never had the new ones
		return d.enter(&rotation{id: r.ID, stage: r.Stage})
	case roster.Finish, roster.Done:
		return d.enter(&rotation{id: r.ID, stage: roster.Finish}) // it joined when the old ones were gone
	}
	l, _, err := d.roster()
	if err != nil {
		return err
	}
	name := k.node.name
	if d.wantKey == nil || d.wantID != r.ID {
		if d.wantKey, err = join.NewSealKey(); err != nil {
			return err
		}
		d.wantID = r.ID
	}
	seal := d.wantKey.PublicKey().Bytes()
	if e := list.Sealed[name]; e.Rotation == r.ID && string(e.Seal) == string(seal) {
		rot, err := d.open(k, e, r.ID)
		if err != nil {
			d.wantKey = nil // ask anew, with another key
			return err
		}
		if err := d.enter(rot); err != nil {
			return err
		}
		d.wantKey = nil
		return l.Took(ctx, name)
	}
	if string(list.Wants[name].Seal) == string(seal) {
		return nil // somebody answers
	}
	w := roster.Want{Rotation: r.ID, Seal: seal, Proof: wantProof(k, r.ID, name, seal)}
	if w.Signature, err = join.SignWant(k.node.key, d.cfg.Random, r.ID, name, seal); err != nil {
		return err
	}
	return l.Ask(ctx, name, w)
}

// wantProof shows that who asks has the keys that only control planes have: to write into etcd is not enough.
func wantProof(k *keyring, id, name string, seal []byte) []byte {
	m := hmac.New(sha256.New, k.cluster.joinKey)
	fmt.Fprintf(m, "bulkhead rotation want\x00%s\x00%s\x00", id, name)
	m.Write(seal)
	return m.Sum(nil)
}

// open takes the new keys over, if who gave them has the authority that is to be replaced.
func (d *Daemon) open(k *keyring, e roster.Sealed, id string) (*rotation, error) {
	plain, err := join.Open(d.wantKey, sealLabel(id), e.Text)
	if err != nil {
		return nil, fmt.Errorf("the new keys cannot be opened: %w", err)
	}
	r, err := parseRotation(plain)
	if err != nil {
		return nil, fmt.Errorf("the new keys: %w", err)
	}
	if !join.VerifyGiven(&k.os.key.PublicKey, id, k.node.name, e.Text, e.Signature) || r.id != id {
		return nil, errors.New("the new keys are not of a control plane of this cluster")
	}
	for _, a := range k.authorities() {
		if t, ok := r.turns[a.name]; ok && !t.old.cert.Equal(a.cert) {
			return nil, fmt.Errorf("the new keys are for another authority in the place of %s than this node has", a.name)
		}
	}
	return r, nil
}

func sealLabel(id string) string { return " rotation " + id }

// give seals the new keys to control planes that ask for them.
func (d *Daemon) give(ctx context.Context, list *roster.State, k *keyring) error {
	for name, w := range list.Wants {
		n, ok := list.Nodes[name]
		if !ok || w.Rotation != k.rot.id || string(list.Sealed[name].Seal) == string(w.Seal) {
			continue
		}
		key, err := join.ParseKey(n.PublicKey)
		if err != nil || n.Role != roster.ControlPlane || !join.VerifyWant(key, w.Rotation, name, w.Seal, w.Signature) || !hmac.Equal(w.Proof, wantProof(k, w.Rotation, name, w.Seal)) {
			d.log.Error("somebody asks for the new authorities' keys who is no control plane", "name", printable(name))
			continue
		}
		if err := d.giveTo(ctx, k, name, w); err != nil {
			return err
		}
		d.log.Info("new authorities' keys sealed", "node", name, "key", n.Key)
	}
	return nil
}

func (d *Daemon) giveTo(ctx context.Context, k *keyring, name string, w roster.Want) error {
	plain, err := k.rot.disk()
	if err != nil {
		return err
	}
	e := roster.Sealed{Rotation: w.Rotation, Seal: w.Seal}
	if e.Text, err = join.Seal(w.Seal, sealLabel(w.Rotation), plain); err != nil {
		return err
	}
	old := k.os
	if t, ok := k.rot.turns["os-ca"]; ok {
		old = t.old
	}
	if e.Signature, err = join.SignGiven(old.key, d.cfg.Random, w.Rotation, name, e.Text); err != nil {
		return err
	}
	l, _, err := d.roster()
	if err != nil {
		return err
	}
	return l.Give(ctx, name, e)
}
