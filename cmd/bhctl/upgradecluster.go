package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// stageLimit is how many nodes get an image at the same time: each writes its disk at full speed meanwhile, and control planes have etcd on theirs.
const stageLimit = 3

// upgradeCluster installs an image on every node first, which changes nothing that runs, and then has the cluster restart them one after the other. Until all have it, this command
// must stay; from then on it may go.
func (a *app) upgradeCluster(ctx context.Context, f upgradeFlags) error {
	if f.roll.resume || f.roll.abort {
		return a.roll(ctx, &f.roll, nil)
	}
	if f.media != "" {
		return errors.New("--media is a device of one node; with --cluster give an --image that every node gets")
	}
	req, err := f.request(a)
	if err != nil {
		return err
	}
	s := &stage{a: a, request: req, told: map[string]string{}}
	if req == nil {
		if s.image, err = openImage(f.image); err != nil {
			return err
		}
		defer s.image.Close()
		m, err := bundle.Parse(s.image.raw)
		if err != nil {
			return fmt.Errorf("%s: %w", f.image, err)
		}
		s.version, s.known = m.Version, m.Version
	}
	nodes, err := a.registered(ctx, f.roll.only)
	if err != nil {
		return err
	}
	version, err := s.run(ctx, nodes)
	switch {
	case ctx.Err() != nil:
		return errors.New("stopped; no node was restarted. The same command goes on where it was. A node that has the version already tries it at its next restart; bhctl -n NAME rollback cancels that")
	case err != nil:
		return err
	case f.noReboot:
		return a.say("%s lies ready on %s; each tries it at its next restart. The same command without --no-reboot restarts them one after the other\n", version, strings.Join(nodes, ", "))
	}
	return a.activate(ctx, &f.roll, version)
}

// activate orders the restarts, or has one go on that halted on its way to the same version.
func (a *app) activate(ctx context.Context, f *rollingFlags, version string) error {
	var now *clusterv1.RollingStatus
	err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		now, err = clusterv1.NewRollingClient(conn).GetStatus(ctx, &clusterv1.GetStatusRequest{})
		return err
	})
	switch {
	case err != nil:
		return err
	case now.GetState() == "halted" && now.GetKind() == "upgrade" && now.GetVersion() == version:
		return a.resume(ctx, f.detach)
	}
	return a.roll(ctx, f, func() (*clusterv1.StartRequest, error) {
		return &clusterv1.StartRequest{Kind: "upgrade", Version: version}, nil
	})
}

// registered returns the names of the cluster's nodes, or of those that are wanted.
func (a *app) registered(ctx context.Context, only []string) (names []string, err error) {
	err = a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		l, err := clusterv1.NewRegistryClient(conn).ListNodes(ctx, &clusterv1.ListNodesRequest{})
		for _, n := range l.GetNodes() {
			if len(only) == 0 || slices.Contains(only, n.GetName()) {
				names = append(names, n.GetName())
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, n := range only {
		if !slices.Contains(names, n) {
			return nil, fmt.Errorf("--only: no node %q is registered; bhctl get nodes lists them", n)
		}
	}
	if len(names) == 0 {
		return nil, errors.New("no node is registered")
	}
	return names, nil
}

// stage brings an image to many nodes.
type stage struct {
	a       *app
	image   *localImage              // nil: the nodes fetch it
	request *updatev1.UpgradeRequest // then
	known   string                   // the version of image; "" without one
	version string                   // the same, or what the first node got; "" until then

	mu   sync.Mutex
	told map[string]string // guarded by mu; by node
}

// staged is what became of one node: version lies ready there, or runs.
type staged struct {
	version string
	runs    string // where installing was refused: what runs there, found good
}

// run returns the version that every node has then.
func (s *stage) run(ctx context.Context, nodes []string) (string, error) {
	var failed []string
	refused := map[string]client.Result[staged]{}
	err := s.a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		for r := range client.Each(ctx, nodes, stageLimit, func(ctx context.Context, node string) (staged, error) { return s.bring(ctx, conn, node) }) {
			switch {
			case r.Err != nil && r.Value.runs != "":
				refused[r.Node] = r
			case r.Err != nil:
				failed = append(failed, fmt.Sprintf("%s: %s", r.Node, errs.Text(r.Err)))
			case s.version != "" && r.Value.version != s.version:
				failed = append(failed, fmt.Sprintf("%s: it got %s, others %s: the image was changed meanwhile; name it by its digest", r.Node, r.Value.version, s.version))
			default:
				s.version = r.Value.version
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	for node, r := range refused {
		if r.Value.runs != s.version {
			failed = append(failed, fmt.Sprintf("%s: %s", node, errs.Text(r.Err)))
		}
	}
	if len(failed) > 0 {
		slices.Sort(failed)
		return "", fmt.Errorf("not every node has the image, and none was restarted; the same command goes on where it was\n  %s", strings.Join(failed, "\n  "))
	}
	return s.version, nil
}

// bring installs the image on one node, unless it has it.
func (s *stage) bring(ctx context.Context, conn *grpc.ClientConn, node string) (staged, error) {
	c := updatev1.NewUpdateClient(conn)
	if s.image != nil { // what version it is, is known
		st, err := c.GetStatus(ctx, &updatev1.GetStatusRequest{})
		if err != nil {
			return staged{}, err
		}
		if text := has(st, s.known); text != "" {
			return staged{version: s.known}, s.say(node, text)
		}
	}
	var last *updatev1.UpgradeProgress
	show := func(p *updatev1.UpgradeProgress) error {
		last = p
		return s.show(node, p)
	}
	err := s.install(ctx, conn, c, show)
	if err != nil && errs.Is(err, errs.Precondition) && s.image == nil {
		if st, e := c.GetStatus(ctx, &updatev1.GetStatusRequest{}); e == nil {
			return staged{runs: runningVersion(st)}, err
		}
	}
	return staged{version: last.GetVersion()}, err
}

func (s *stage) install(ctx context.Context, conn *grpc.ClientConn, c updatev1.UpdateClient, show func(*updatev1.UpgradeProgress) error) error {
	if s.image != nil {
		return upload(ctx, conn, s.image, show)
	}
	stream, err := c.Upgrade(ctx, s.request)
	if err != nil {
		return err
	}
	return receive(stream, show)
}

// has says so if a version runs on a node and was found good, or lies ready there.
func has(st *updatev1.Status, version string) string {
	for _, x := range st.GetSlots() {
		switch {
		case x.GetVersion() != version:
		case x.GetRunning() && x.GetStatus() == "good":
			return "runs " + version + " already"
		case !x.GetRunning() && x.GetNext():
			return version + " lies ready already"
		}
	}
	return ""
}

// show writes a line for each step and each quarter of it.
func (s *stage) show(node string, p *updatev1.UpgradeProgress) error {
	if s.a.format != "table" {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.a.printMessage(p)
	}
	quarter := uint64(0)
	if p.GetTotalBytes() > 0 {
		quarter = 4 * p.GetDoneBytes() / p.GetTotalBytes()
	}
	s.mu.Lock()
	told := fmt.Sprint(p.GetStep(), quarter, p.GetNote())
	same := s.told[node] == told
	s.told[node] = told
	s.mu.Unlock()
	if same {
		return nil
	}
	return s.say(node, strings.TrimSpace(progressLine(p)))
}

func (s *stage) say(node, text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.a.say("%s  %s\n", node, text)
}
