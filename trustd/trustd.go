// Package trustd is the node's authority: the only process that holds private keys of certificate authorities, token keys and
// the key behind Kubernetes' secrets. Others send it requests and get signatures.
//
// It has no capability and no network. It may read and write its own two folders and the console. It must not know what
// other daemons do with what it signs; who may ask for what is the table in profile.go.
package trustd

import (
	"context"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	externaljwtv1 "k8s.io/externaljwt/apis/v1"
	kmsv2 "k8s.io/kms/apis/v2"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// Config is fixed for the life of the process.
type Config struct {
	Env daemon.Env
	// Runtime is the folder for keys until StateDir appears; both required.
	Runtime, StateDir string
	// ClaimKey is a file with a key that replaces the code on the console; it need not exist.
	ClaimKey string
	// Blocks is the kernel's folder of block devices; there one sees whether a STATE volume is on its way.
	Blocks string
	// Locked is a file that is there while STATE is encrypted and nothing has opened it yet; storaged makes it.
	Locked string
	// Console is where the claim code is shown; nil: nowhere.
	Console io.Writer
	// Socket returns the path of another daemon's socket; nil: peer.Socket.
	Socket func(daemon string) string
	// Now and Random are the clock and the randomness; nil: the real ones.
	Now    func() time.Time
	Random io.Reader
}

// Daemon is trustd. Make it with New; Run must be called once.
type Daemon struct {
	cfg Config
	log *slog.Logger

	start time.Time

	mu      sync.Mutex // serialises changes of keys and of where they lie
	code    string     // guarded by mu; normalized claim code; "" once claimed or while it is not known whether it is
	where   place      // guarded by mu
	locked  bool       // guarded by mu; STATE is locked
	reason  string     // guarded by mu; why, in storaged's words
	since   time.Time  // guarded by mu; from when on a STATE that is there has stateWait to be mounted
	problem string     // guarded by mu; of the last look at the folders
	// known is what was last heard of the cluster: nodes and revocations, on a worker all of it. Guarded by mu; never changed, only replaced.
	known      *trustv1.TrustState
	membership error      // guarded by mu; why the cluster does not take the node for its own
	joining    sync.Mutex // held while the node tries to join: one try at a time

	keys  latest.Cell[*keyring]            // never nil
	spec  latest.Cell[*spec]               // never nil
	trust latest.Cell[*trustv1.TrustState] // made from keys and spec
	state latest.Cell[*controlv1.State]    // made from spec and where
	// list is the cluster's list of nodes, on a control plane; nil until etcd has answered once.
	list latest.Cell[*roster.State]
	own  latest.Cell[[]string] // addresses of this node, in the words of etcdd, which has a network; sorted
	slow chan struct{}         // slots for answers to wrong proofs
	// word is what other nodes hear of the cluster from this one, made from list.
	word     latest.Cell[*trustv1.TrustState]
	instance []byte              // of this run; tells two machines with one key apart
	lookups  chan struct{}       // slots for reading etcd on behalf of strangers
	lastGood latest.Cell[string] // endpoint of the control plane that answered last
	past     signed              // what was signed since the start
	count    figures

	ears     ears                // daemons that follow what is trusted
	rotating sync.Mutex          // held while authorities are replaced a step further; before mu
	wantKey  hpke.PrivateKey     // guarded by rotating; to which the new keys are to be sealed
	wantID   string              // guarded by rotating; for which replacement
	kept     *trustv1.TrustState // guarded by mu; what of known is on the disk

	etcdd, apid, storaged *grpc.ClientConn // opened when first used
}

// Run is trustd as PID 1 starts it.
func Run(ctx context.Context, env daemon.Env) error {
	cfg := Config{
		Env: env, Runtime: filepath.Join(unit.RunDir, env.Name), StateDir: filepath.Join(unit.StateDir, env.Name),
		ClaimKey: filepath.Join(unit.RunDir, "claim-key"), Blocks: "/sys/class/block", Locked: unit.LockedFile,
	}
	if env.Console != nil {
		cfg.Console = env.Console
	}
	d, err := New(cfg)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New checks the configuration and reads the keys that are there already.
func New(cfg Config) (*Daemon, error) {
	if cfg.Env.Log == nil || cfg.Env.Metrics == nil || cfg.Runtime == "" || cfg.StateDir == "" {
		return nil, errors.New("trustd: log, metrics and both folders are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Socket == nil {
		cfg.Socket = peer.Socket
	}
	if cfg.Random == nil {
		cfg.Random = rand.Reader
	}
	d := &Daemon{cfg: cfg, log: cfg.Env.Log, start: cfg.Now(), since: cfg.Now(), slow: make(chan struct{}, wrongProofs), instance: make([]byte, join.InstanceSize), lookups: make(chan struct{}, maxLookups), count: newFigures(cfg.Env.Metrics)}
	for _, c := range []struct {
		daemon string
		to     **grpc.ClientConn
	}{{"etcdd", &d.etcdd}, {"apid", &d.apid}, {"storaged", &d.storaged}} {
		conn, err := peer.Dial(cfg.Socket(c.daemon))
		if err != nil {
			return nil, err
		}
		*c.to = conn
	}
	if _, err := io.ReadFull(cfg.Random, d.instance); err != nil {
		return nil, err
	}
	if err := d.ears.load(cfg.Runtime, cfg.Now()); err != nil {
		d.log.Warn("who listened before is not known", "err", err.Error())
	}
	d.keys.Set(&keyring{})
	d.spec.Set(&spec{})
	d.report()
	return d, nil
}

// Run serves until ctx is done; it returns ctx's error.
func (d *Daemon) Run(ctx context.Context) error {
	if err := d.settle(); err != nil {
		d.log.Warn("keys not settled yet", "err", err.Error())
	}
	g, ctx := errgroup.WithContext(ctx)
	defer d.etcdd.Close()
	defer d.apid.Close()
	defer d.storaged.Close()
	g.Go(func() error { return d.follow(ctx) })
	g.Go(func() error { return d.followCluster(ctx) })
	g.Go(func() error { return d.keepRecord(ctx) })
	g.Go(func() error { return d.rotate(ctx) })
	g.Go(func() error {
		return daemon.Serve(ctx, d.cfg.Env, Callers(), func(s *grpc.Server) {
			trustv1.RegisterClaimServer(s, claimServer{d: d})
			trustv1.RegisterTrustServer(s, trustServer{d: d})
			trustv1.RegisterAuthoritiesServer(s, authoritiesServer{d: d})
			trustv1.RegisterSignerServer(s, signerServer{d: d})
			trustv1.RegisterJoinServer(s, joinServer{d: d})
			trustv1.RegisterNodesServer(s, nodesServer{d: d})
			trustv1.RegisterMembershipServer(s, membershipServer{d: d})
			trustv1.RegisterDepartureServer(s, departureServer{d: d})
			externaljwtv1.RegisterExternalJWTSignerServer(s, jwtServer{d: d})
			kmsv2.RegisterKeyManagementServiceServer(s, kmsServer{d: d})
			controlv1.RegisterControlServer(s, controlServer{d: d})
		})
	})
	return g.Wait()
}

// Callers lists who may call what, besides apid (public services) and machined (control).
func Callers() peer.List {
	return peer.List{
		trustv1.Signer_ServiceDesc.ServiceName:                  {uid.Apid, uid.Gateway, uid.Etcdd, uid.Kubeletd},
		externaljwtv1.ExternalJWTSigner_ServiceDesc.ServiceName: {uid.KubeAPIServer},
		kmsv2.KeyManagementService_ServiceDesc.ServiceName:      {uid.KubeAPIServer},
	}
}

// follow looks again and again until the keys lie on STATE. A mount gives no file event, so this asks; when
// all is settled it asks no more.
func (d *Daemon) follow(ctx context.Context) error {
	timer := time.NewTimer(lookOften)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		err := d.settle()
		if err == nil && d.settled() {
			<-ctx.Done()
			return ctx.Err()
		}
		next := lookOften
		if d.cfg.Now().Sub(d.start) > lookOftenFor {
			next = lookSeldom
		}
		timer.Reset(next)
	}
}

// Pauses between two looks for the STATE volume: often while the machine boots, for every daemon waits for it.
const (
	lookOften    = 50 * time.Millisecond
	lookSeldom   = 500 * time.Millisecond
	lookOftenFor = 30 * time.Second
)

// banner is shown on the console while nobody owns the node.
func banner(code string) string {
	const line = "======================================================================"
	if code == "" {
		return "\n" + line + "\n  Nobody owns this node yet. It is claimed with the key that it was\n  started with (no code is shown): bhctl claim ADDRESS\n" + line + "\n\n"
	}
	return fmt.Sprintf("\n%s\n  Nobody owns this node yet.  Claim code:  %s\n  On your own machine:  bhctl claim ADDRESS\n%s\n\n", line, code, line)
}

// maxReason bounds what the console shows of storaged's words, in bytes.
const maxReason = 300

// lockedBanner is shown while STATE is locked; reason is storaged's, "" if it has none.
func lockedBanner(reason string) string {
	if reason = strings.TrimSpace(reason); reason != "" {
		reason = "  " + strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "") + "\n"
	}
	return "\n  The volume STATE is locked, and nothing on this machine opens it.\n" + reason + "  On your own machine, with its recovery key:  bhctl unlock ADDRESS\n\n"
}

func (d *Daemon) show(text string) {
	if d.cfg.Console == nil {
		return
	}
	if _, err := io.WriteString(d.cfg.Console, text); err != nil {
		d.log.Warn("console not written", "err", err.Error())
	}
}

// exists reports whether there is a folder at path.
func exists(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
