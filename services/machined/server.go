package machined

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/timestamppb"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// maxName bounds what a caller may call a text, in bytes.
const maxName = 255

// configServer is config.v1.Config.
type configServer struct {
	configv1.UnimplementedConfigServer
	d *Daemon
}

func (s *configServer) Apply(ctx context.Context, r *configv1.ApplyRequest) (*configv1.ApplyResponse, error) {
	name := r.GetName()
	if name == "" {
		name = "document"
	}
	if len(name) > maxName {
		return nil, errs.New(errs.Invalid, "name: %d bytes; at most %d are allowed", len(name), maxName)
	}
	// It begins the lines of errors, and stands in lists that people see.
	if strings.TrimSpace(name) != name || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return nil, errs.New(errs.Invalid, "name: found %q; printable characters are allowed, without a space at either end", name)
	}
	set, err := config.Parse(name, []byte(r.GetDocuments()))
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	unlock, err := s.d.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return s.d.applyChange(ctx, change{parsed: set, fresh: freshName(), dryRun: r.GetDryRun(), next: store.Generation{
		Applied: time.Now(), Caller: caller(ctx), Name: name, Documents: []byte(r.GetDocuments()),
	}})
}

// caller names who stands behind a call.
func caller(ctx context.Context) string {
	if c := peer.CallerFrom(ctx); c.Name != "" {
		return c.Name
	}
	if id, ok := peer.From(ctx); ok {
		return id.Name()
	}
	return "unknown"
}

func (s *configServer) Get(ctx context.Context, r *configv1.GetRequest) (*configv1.GetResponse, error) {
	if err := s.d.lookedUp(ctx); err != nil {
		return nil, err
	}
	g, _ := s.d.running.Get()
	if n := r.GetGeneration(); n != 0 && n != g.Number {
		var err error
		if g, err = s.d.stored(n); err != nil {
			return nil, err
		}
	}
	if g.Number == 0 {
		return nil, errs.New(errs.NotFound, "the node has no configuration yet; apply one, an empty document will do")
	}
	return &configv1.GetResponse{
		Generation: g.Number, Documents: string(g.Documents), Effective: string(config.Marshal(g.set)),
		Applied: timestamppb.New(g.Applied), Caller: g.Caller,
	}, nil
}

// stored reads a generation that is not the running one.
func (d *Daemon) stored(n uint64) (running, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == nil {
		return running{}, errs.New(errs.NotFound, "generation %d is not stored: there is no STATE yet", n)
	}
	g, err := d.store.Load(n)
	if errors.Is(err, fs.ErrNotExist) {
		return running{}, errs.New(errs.NotFound, "generation %d is not stored; ListHistory shows those that are", n)
	}
	if err != nil {
		return running{}, err
	}
	out := running{Generation: g}
	if set, err := config.Parse(g.Name, g.Documents); err == nil {
		out.set = named(set, g.Hostname)
	} // else an older version took it; its documents can still be read
	return out, nil
}

func (s *configServer) ListHistory(ctx context.Context, _ *configv1.ListHistoryRequest) (*configv1.ListHistoryResponse, error) {
	if err := s.d.lookedUp(ctx); err != nil {
		return nil, err
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	out := &configv1.ListHistoryResponse{}
	if s.d.store == nil {
		return out, nil
	}
	for _, g := range s.d.store.List() {
		out.Generations = append(out.Generations, &configv1.Generation{
			Generation: g.Number, Applied: timestamppb.New(g.Applied), Caller: g.Caller, Sha256: g.Sum,
		})
	}
	return out, nil
}

func (s *configServer) ListSpecs(ctx context.Context, _ *configv1.ListSpecsRequest) (*configv1.ListSpecsResponse, error) {
	if err := s.d.lookedUp(ctx); err != nil {
		return nil, err
	}
	now, _ := s.d.running.Get()
	out := &configv1.ListSpecsResponse{}
	for _, h := range s.d.hands {
		_, st := h.report(now.Number)
		out.Specs = append(out.Specs, &configv1.SpecState{
			Daemon: h.daemon, Generation: st.GetGeneration(), Converged: st.GetConverged(), Pending: st.GetPending(), Error: st.GetError(),
		})
	}
	return out, nil
}
