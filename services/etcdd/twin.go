package etcdd

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// alone refuses to start a member that runs already, on another machine: after a disk was copied two would give one vote twice. Other control planes
// are asked where the member of this name is; if that is not here, and who answers there shows a certificate of this name, there is a twin. If nobody
// answers nothing is known, and the member starts: a cluster must come up after all its nodes were off.
func (m *member) alone(ctx context.Context, name string) error {
	own, err := m.cfg.Addresses()
	if err != nil {
		return err
	}
	here := func(a netip.Addr) bool {
		return a.IsLoopback() && len(own) == 0 || slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Addr() == a })
	}
	ctx, cancel := context.WithTimeout(ctx, 2*answerTime)
	defer cancel()
	c := m.peerClient()
	defer c.CloseIdleConnections()
	for _, u := range m.whereabouts(ctx, c, name) {
		if here(nodeaddr.InURL(u)) {
			continue
		}
		resp, err := ask(ctx, c, u)
		if err != nil {
			continue
		}
		resp.Body.Close()
		if resp.TLS != nil && slices.Contains(resp.TLS.PeerCertificates[0].DNSNames, name) {
			return errs.New(errs.Precondition, "another machine runs the member %q, at %s: one of the two disks is a copy of the other; switch this machine or that one off, and reset it", name, u)
		}
	}
	return nil
}

// whereabouts are the URLs at which the other control planes that answer know a member.
func (m *member) whereabouts(ctx context.Context, c *http.Client, name string) []string {
	roots, _ := m.trust.Roots()
	var mu sync.Mutex
	var found []string
	var g sync.WaitGroup
	for _, n := range roots.State.GetNodes() {
		if n.GetRole() != "controlplane" || n.GetName() == name {
			continue
		}
		for _, a := range nodeaddr.Parse(n.GetAddresses()) {
			g.Go(func() {
				resp, err := ask(ctx, c, peerURL(a, m.port()))
				if err != nil {
					return
				}
				defer resp.Body.Close()
				var list []struct {
					Name     string   `json:"name"`
					PeerURLs []string `json:"peerURLs"`
				}
				if json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 1<<20)).Decode(&list) != nil {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				for _, x := range list {
					if x.Name == name {
						found = append(found, x.PeerURLs...)
					}
				}
			})
		}
	}
	g.Wait()
	slices.Sort(found)
	return slices.Compact(found)
}

// ask asks a member for all members. The caller closes the answer's body.
func ask(ctx context.Context, c *http.Client, peerURL string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(peerURL, "/")+"/members", nil)
	if err != nil {
		return nil, err
	}
	return c.Do(req)
}
