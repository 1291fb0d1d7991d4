package etcdd

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// answerTime is how long a member may take to show that it is there.
const answerTime = 2 * time.Second

// voice is a member, and whether it answers.
type voice struct {
	id             uint64
	name           string // "" until it has started
	urls           []string
	learner        bool
	answers, leads bool
}

func (v voice) String() string {
	if v.name == "" {
		return hexID(v.id) + ", which has not started yet"
	}
	return v.name
}

// mayGo refuses the removal of a member if those that stay would have no quorum: more than half of all voters must answer. It is pure.
func mayGo(all []voice, id uint64) error {
	var stay, silent []string
	for _, v := range all {
		switch {
		case v.id == id && v.learner:
			return nil // it has no vote
		case v.id == id, v.learner:
		case v.answers:
			stay = append(stay, v.String())
		default:
			silent = append(silent, v.String())
		}
	}
	n := len(stay) + len(silent)
	if n == 0 {
		return errs.New(errs.Precondition, "it is the last member that votes: all data would go with it; to be rid of the node, reset it")
	}
	if need := n/2 + 1; len(stay) < need {
		return errs.New(errs.Precondition, "etcd would have no quorum: of the %d voters that stay, %d must answer, and %d do; silent: %s. Bring them back, or remove them first",
			n, need, len(stay), strings.Join(silent, ", "))
	}
	return nil
}

// allThere refuses while a member is away.
func allThere(all []voice, what string) error {
	for _, v := range all {
		if !v.answers {
			return errs.New(errs.Precondition, "%s: %s does not answer, and this member would be away too meanwhile; bring it back, or remove it", what, v)
		}
	}
	return nil
}

// find returns a member by its name or its hexadecimal id.
func find(all []voice, name string) (voice, error) {
	var names []string
	for _, v := range all {
		if name != "" && (v.name == name || hexID(v.id) == strings.ToLower(name)) {
			return v, nil
		}
		names = append(names, fmt.Sprintf("%s (%s)", v.name, hexID(v.id)))
	}
	slices.Sort(names)
	return voice{}, errs.New(errs.NotFound, "etcd has no member %.64q; there are %s", name, strings.Join(names, ", "))
}

// voices lists all members, which takes a quorum, and asks each whether it is there.
func (m *member) voices(ctx context.Context) ([]voice, error) {
	e, client := m.running()
	if client == nil {
		return nil, errs.New(errs.Unavailable, "the etcd member does not run")
	}
	list, err := m.list(ctx, client)
	if err != nil {
		return nil, err
	}
	leader := uint64(e.Server.Leader())
	out := make([]voice, len(list))
	c := m.peerClient()
	defer c.CloseIdleConnections()
	var g sync.WaitGroup
	for i, x := range list {
		out[i] = voice{id: x.GetID(), name: x.GetName(), urls: x.GetPeerURLs(), learner: x.GetIsLearner(), leads: x.GetID() == leader}
		if x.GetID() == uint64(e.Server.MemberID()) {
			out[i].answers = true
			continue
		}
		g.Go(func() {
			out[i].answers = slices.ContainsFunc(x.GetPeerURLs(), func(u string) bool { return answers(ctx, c, u) })
		})
	}
	g.Wait()
	return out, nil
}

// silent counts the voters that this member knows of, and names those of the others that do not answer. It takes no quorum.
func (m *member) silent(ctx context.Context, e *embed.Etcd) (voters int, names []string) {
	c := m.peerClient()
	defer c.CloseIdleConnections()
	var g sync.WaitGroup
	var mu sync.Mutex
	for _, x := range e.Server.Cluster().Members() {
		if x.IsLearner {
			continue
		}
		voters++
		if x.ID == e.Server.MemberID() {
			continue
		}
		g.Go(func() {
			if slices.ContainsFunc(x.PeerURLs, func(u string) bool { return answers(ctx, c, u) }) {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			names = append(names, voice{id: uint64(x.ID), name: x.Name}.String())
		})
	}
	g.Wait()
	slices.Sort(names)
	return voters, names
}

// list asks for all members, linearizably.
func (m *member) list(ctx context.Context, c *clientv3.Client) ([]*etcdserverpb.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	resp, err := c.MemberList(ctx)
	if err != nil {
		return nil, memberError("list members", err)
	}
	return resp.Members, nil
}

// peerClient speaks to other members as one of them.
func (m *member) peerClient() *http.Client {
	roots, _ := m.trust.Roots()
	return &http.Client{Timeout: answerTime, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots.Etcd, GetClientCertificate: m.leaves[peerProfile].GetClientCertificate},
	}}
}

// answers asks for what every member tells: a process that is frozen, or a host that only its neighbours still know, says nothing.
func answers(ctx context.Context, c *http.Client, peerURL string) bool {
	resp, err := ask(ctx, c, peerURL)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20))
	return err == nil && resp.StatusCode == http.StatusOK
}
