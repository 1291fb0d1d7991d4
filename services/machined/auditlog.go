package machined

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/auditchain"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/services/machined/audit"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// auditFolder is the audit log's, in machined's own on STATE.
const auditFolder = "audit"

// lastWord bounds how long the end of the machine waits for the cluster to hear of the audit log's end.
const lastWord = 2 * time.Second

// openAudit gives the audit log its files, now that STATE is there. The node answers without: its calls are in apid's log, and held for later.
func (d *Daemon) openAudit() {
	made, err := store.OpenFolder(d.cfg.past.Folder(), auditFolder)
	if err == nil {
		err = made.Close()
	}
	var folder *os.Root
	if err == nil {
		folder, err = os.OpenRoot(d.cfg.past.Folder() + "/" + auditFolder)
	}
	if err == nil {
		err = d.audit.Open(folder)
	}
	if err != nil {
		d.auditTrouble(err)
	}
}

// auditTrouble says that calls cannot be written to the audit log.
func (d *Daemon) auditTrouble(err error) {
	d.cfg.Log.Error("audit log not written", "err", err.Error())
	d.events.say("machined", typeConfig, "the audit log cannot be written; calls are answered all the same: "+err.Error())
}

func (d *Daemon) keepAudit(ctx context.Context) error { return d.audit.Run(ctx, d.auditTrouble) }

// tap takes a line of a unit's log; apid's audit lines go into the audit log too, and some daemons' events among the events.
func (d *Daemon) tap(name string) func(time.Time, string) {
	tell := d.teller(name)
	return func(at time.Time, text string) {
		d.journal.Add(at, name, text)
		if tell != nil {
			tell(at, logs.Clean(text))
		}
		if name == "apid" {
			d.audit.Add(at, logs.Clean(text))
		}
	}
}

// auditHead is what the cluster is to remember of the audit log; nil: nothing.
func (d *Daemon) auditHead(last bool) *clusterv1.AuditHead {
	h := d.audit.Head()
	if h.Sequence == 0 {
		return nil
	}
	return &clusterv1.AuditHead{Chain: h.Chain, Sequence: h.Sequence, Hash: h.Hash, Last: last}
}

// lastReport tells the cluster the end of the audit log before the machine goes down, if the cluster listens.
func (d *Daemon) lastReport() {
	n := d.self(d.protection.trouble())
	if n == nil || d.cfg.cluster == nil {
		return
	}
	if err := d.audit.Sync(); err != nil {
		d.cfg.Log.Warn("audit log not on the disk", "err", err.Error())
	}
	n.Audit = d.auditHead(true)
	ctx, cancel := context.WithTimeout(context.Background(), lastWord)
	defer cancel()
	if _, err := d.report(ctx, n); err != nil { // it goes down already, whatever it is told to do
		d.cfg.Log.Warn("end of the audit log not told to the cluster", "err", errs.Text(err))
	}
}

// entry is what apid writes about a call.
type entry struct {
	Who, Roles, Method, Peer, Node, Target, Via, Code string
	Change                                            bool
}

func auditRecord(line []byte) *machinev1.AuditRecord {
	out := &machinev1.AuditRecord{Line: strings.ToValidUTF8(string(line), "?")}
	r, err := auditchain.Parse(line)
	if err != nil {
		out.Kind, out.Note = "damaged", err.Error()
		return out
	}
	out.Chain, out.Sequence, out.Time, out.BootId, out.Kind, out.Note, out.Hash = r.Chain, r.Sequence, timestamppb.New(r.Time), r.Boot, string(r.Kind), r.Note, r.Hash
	var e entry
	if r.Entry == nil || json.Unmarshal(r.Entry, &e) != nil { // a later version's: the line has it
		return out
	}
	out.Who, out.Method, out.Peer, out.Node, out.Target, out.Via, out.Code, out.Change = e.Who, e.Method, e.Peer, e.Node, e.Target, e.Via, e.Code, e.Change
	if e.Roles != "" {
		out.Roles = strings.Split(e.Roles, ",")
	}
	return out
}

// wanted reports whether a record passes a request's filters. It is pure.
func wanted(r *machinev1.GetAuditRequest, a *machinev1.AuditRecord) bool {
	if since := r.GetSince(); since != nil && (a.GetTime() == nil || a.GetTime().AsTime().Before(since.AsTime())) {
		return false
	}
	return (r.GetUser() == "" || a.GetWho() == r.GetUser()) &&
		(r.GetMethod() == "" || strings.Contains(a.GetMethod(), r.GetMethod())) &&
		(!r.GetChanged() || a.GetChange() && a.GetCode() == "OK")
}

// GetAudit reads the files at the reader's pace: a slow one holds nobody up.
func (s *machineServer) GetAudit(r *machinev1.GetAuditRequest, stream grpc.ServerStreamingServer[machinev1.AuditRecord]) error {
	if r.GetSince() != nil && r.GetSince().CheckValid() != nil {
		return errs.New(errs.Invalid, "since: %d seconds and %d nanoseconds are no time; give one like 2026-11-26T15:04:05Z", r.GetSince().GetSeconds(), r.GetSince().GetNanos())
	}
	free, err := s.d.slot()
	if err != nil {
		return err
	}
	defer free()
	if err := s.d.audit.Sync(); err != nil {
		s.d.cfg.Log.Warn("audit log not on the disk", "err", err.Error())
	}
	err = s.d.audit.Stream(stream.Context(), r.GetFollow(), func(line []byte) error {
		a := auditRecord(line)
		if !wanted(r, a) {
			return nil
		}
		return stream.Send(a)
	})
	if errors.Is(err, audit.ErrClosed) {
		return errs.New(errs.Precondition, "%s: calls are in apid's log until then (bhctl logs apid), and come into the audit log when it opens", err)
	}
	return err
}
