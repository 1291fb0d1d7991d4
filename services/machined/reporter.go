package machined

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/version"
)

// The register of nodes takes a node for lost after 30 s without a report.
const (
	reportPause  = 10 * time.Second // between two reports that say the same
	reportLook   = 2 * time.Second  // between two looks at whether there is something else to say
	reportAgain  = 2 * time.Second  // after the first that fails; then twice as long, up to reportPause
	reportTime   = 12 * time.Second // for one report: apid gives a control plane that does not answer five, then asks the next
	versionsTime = time.Second      // of that, for updated
	maxDetail    = 1024             // bytes; the register takes no more
	unanswered   = "api.answered"   // the check that says whether anybody called: a node that nobody needs is none the worse
)

// A cluster is what the node reports to.
type cluster interface {
	// Addresses returns those at which others could reach the node.
	Addresses(context.Context) ([]string, error)
	// Versions returns the version that the next boot tries, "" if it starts the running one, and whether that one has not been found good yet.
	Versions(context.Context) (next string, trial bool, err error)
	// Report tells how the node is, and returns what it is to do.
	Report(context.Context, *clusterv1.Node) (*clusterv1.ReportResponse, error)
}

// far is the cluster's register, at whichever control plane answers.
type far struct {
	network  networkv1.NetworkClient
	update   updatev1.UpdateClient
	registry clusterv1.RegistryClient
}

// newFar speaks to networkd, updated and, through apid, to control planes.
func newFar(networkd, updated, apid *grpc.ClientConn) far {
	return far{networkv1.NewNetworkClient(networkd), updatev1.NewUpdateClient(updated), clusterv1.NewRegistryClient(apid)}
}

func (f far) Addresses(ctx context.Context) ([]string, error) {
	st, err := f.network.GetStatus(ctx, &networkv1.GetStatusRequest{})
	return addresses(st), err
}

func (f far) Versions(ctx context.Context) (string, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, versionsTime)
	defer cancel()
	st, err := f.update.GetStatus(ctx, &updatev1.GetStatusRequest{})
	next, trial := versions(st)
	return next, trial, err
}

// versions: a machine that no boot loader starts has no slots, and neither; then updated says why. One that says nothing at all has not looked yet.
func versions(st *updatev1.Status) (next string, trial bool) {
	if len(st.GetSlots()) == 0 {
		return "", st.GetError() == ""
	}
	for _, s := range st.GetSlots() {
		switch {
		case s.GetRunning():
			trial = s.GetStatus() == "on trial"
		case s.GetNext():
			next = s.GetVersion()
		}
	}
	return next, trial
}

// addresses are those that the document or a lease gave; pods' bridges and the loopback interface have others.
func addresses(st *networkv1.Status) []string {
	var out []string
	for _, a := range st.GetAddresses() {
		p, err := netip.ParsePrefix(a.GetAddress())
		if err == nil && (a.GetOrigin() == "static" || a.GetOrigin() == "dhcp") && p.Addr().IsGlobalUnicast() && len(out) < 32 {
			out = append(out, p.Addr().String())
		}
	}
	return out
}

func (f far) Report(ctx context.Context, n *clusterv1.Node) (*clusterv1.ReportResponse, error) {
	return f.registry.Report(metadata.AppendToOutgoingContext(ctx, peer.NodeKey, peer.ControlPlanes), &clusterv1.ReportRequest{Node: n})
}

// afterFailures is how long a report waits after so many failures in a row, at least one, whatever there is to say. chance, from 0 to 1, takes or gives a quarter, so
// that nodes that lost the cluster together do not come back together. It is pure.
func afterFailures(n int, chance float64) time.Duration {
	pause := reportPause
	if n < 4 {
		pause = min(pause, reportAgain<<(n-1))
	}
	return min(reportPause, time.Duration(float64(pause)*(0.75+chance/2)))
}

// reportSelf tells the cluster how the node is: every few seconds, and at once when that changes. A cluster that does not listen is tried again
// later: the node does its job without.
func (d *Daemon) reportSelf(ctx context.Context) error {
	var told *clusterv1.Node
	var at time.Time // of the last report
	var said, clock string
	var ordered *clusterv1.ReportResponse
	var failures int
	var pause time.Duration // after the last of them
	t := time.NewTicker(reportLook)
	defer t.Stop()
	for {
		clock = d.tellClock(clock)
		due := time.Since(at) >= reportPause || ordered.GetSoon()
		if failures > 0 {
			due = time.Since(at) >= pause
		}
		if n := d.self(d.protection.trouble()); n != nil && (due || failures == 0 && (told == nil || n.GetState() != told.GetState() || n.GetDetail() != told.GetDetail())) {
			call, cancel := context.WithTimeout(ctx, reportTime)
			var err error
			ordered, err = d.report(call, n)
			cancel()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			told, at = n, time.Now()
			if failures++; err == nil {
				failures = 0
			}
			pause = afterFailures(max(failures, 1), rand.Float64())
			// A node without a cluster, or whose control planes are away, says so elsewhere.
			if text := errs.Text(err); text != said && err != nil && !errs.Is(err, errs.Unavailable) {
				d.cfg.Log.Warn("node not reported to the cluster", "err", text)
			}
			said = errs.Text(err)
			d.follow(ordered.GetOrder())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// follow restarts the machine if the cluster says so, and means this boot. The same order comes again as long as it is not followed.
func (d *Daemon) follow(o *clusterv1.Order) {
	if o == nil || o.GetBootId() == "" || o.GetBootId() != d.cfg.past.ID() {
		return
	}
	text := o.GetText()
	if !fit(text) {
		text = "restart: a rolling change"
	}
	if !d.following.CompareAndSwap(false, true) {
		return // it takes a moment until all has stopped
	}
	err := d.order(func() error {
		d.noteOrder(text)
		err := d.cfg.init.Reboot()
		if errors.Is(err, initctl.Halting) { // it goes down already
			return nil
		}
		d.following.Store(err == nil)
		return err
	})
	if err != nil { // another order is being carried out; this one comes again
		d.following.Store(false)
		return
	}
	d.cfg.Log.Info("power order", "step", text)
	d.events.say("machined", typePower, text)
}

// fit reports whether a text from elsewhere may stand in a line.
func fit(text string) bool {
	return text != "" && len(text) <= maxDetail && utf8.ValidString(text) && !strings.ContainsFunc(text, unicode.IsControl)
}

func (d *Daemon) report(ctx context.Context, n *clusterv1.Node) (*clusterv1.ReportResponse, error) {
	var err error
	if n.Addresses, err = d.cfg.cluster.Addresses(ctx); err != nil {
		d.cfg.Log.Debug("addresses not known", "err", errs.Text(err)) // the control planes see one anyway
	}
	if n.NextVersion, n.Trial, err = d.cfg.cluster.Versions(ctx); err != nil {
		d.cfg.Log.Debug("versions not known", "err", errs.Text(err))
		n.Trial = true // not known to be good
	}
	before := time.Now()
	r, err := d.cfg.cluster.Report(ctx, n)
	if err == nil && r.GetClock() != nil { // one of an older version has none
		d.heardClock(r.GetClock().AsTime(), before)
	}
	return r, err
}

// trialServer is machine.v1.Trial.
type trialServer struct {
	machinev1.UnimplementedTrialServer
	d *Daemon
}

// Witness takes a control plane's word only: the proof is that somebody else gets through.
func (s *trialServer) Witness(ctx context.Context, _ *machinev1.WitnessRequest) (*machinev1.WitnessResponse, error) {
	if name, control, ok := peer.NodeFrom(ctx); !ok || !control {
		return nil, errs.New(errs.Denied, "witness: control planes may call it; this caller is %q", name)
	}
	s.d.witness(ctx)
	return &machinev1.WitnessResponse{}, nil
}

// self is the node as it would report itself; nil while it has no configuration and so no name.
func (d *Daemon) self(open string) *clusterv1.Node {
	now, _ := d.running.Get()
	if now.Number == 0 || now.set.Machine.Hostname == "" {
		return nil
	}
	n := &clusterv1.Node{Name: now.set.Machine.Hostname, Role: string(now.set.Machine.Role), Version: version.Version, BootId: d.cfg.past.ID()}
	n.Audit = d.auditHead(false)
	n.State, n.Detail = verdict(d.health(open).GetChecks())
	return n
}

// verdict is ready unless a check fails; then it names the first.
func verdict(checks []*machinev1.Check) (state, detail string) {
	for _, c := range checks {
		if c.GetOk() || c.GetName() == unanswered {
			continue
		}
		detail = c.GetName() + ": " + c.GetDetail()
		return "not ready", detail[:min(len(detail), maxDetail)]
	}
	return "ready", ""
}
