package wired

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/auditchain"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/services/machined/audit"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// Every call that was answered is a record, whoever called at the same time: from apid's own log, through a pipe as PID 1 makes it, into the chain.
func TestAnsweredCallsAreAudited(t *testing.T) {
	n := newNode(t)
	n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
	r, w, err := os.Pipe()
	n.must(err)
	n.apidLog = daemon.NewLog(w, "apid")
	n.startTrustd()
	stop := n.startApid()
	kept := audit.New("boot")
	folder, err := os.OpenRoot(t.TempDir())
	n.must(err)
	n.must(kept.Open(folder))
	defer kept.Close()
	unit, err := logs.Open(filepath.Join(n.dir, "apid.log"))
	n.must(err)
	defer unit.Close()
	unit.Tap = func(at time.Time, text string) { kept.Add(at, logs.Clean(text)) }
	copied := make(chan error, 1)
	go func() { copied <- unit.Copy(r, time.Now) }()

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	creds, err := client.Claim(ctx, n.address, n.console.code(t), "ann")
	n.must(err)
	const callers, each = 4, 10
	var wait sync.WaitGroup
	for c := range callers {
		wait.Go(func() {
			conn, err := client.Dial(n.address, creds)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			for i := range each {
				if _, err := trustv1.NewTrustClient(conn).MintToken(ctx, &trustv1.MintTokenRequest{Name: fmt.Sprintf("c%d-%d", c, i), Roles: []string{"reader"}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	stop()
	n.must(w.Close())
	if err := <-copied; !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	n.must(kept.Sync())
	v, minted, claims := auditchain.Verifier{Anchors: []auditchain.Anchor{{Head: kept.Head()}}}, 0, 0
	n.must(kept.Stream(ctx, false, func(line []byte) error {
		v.Add(line)
		rec, err := auditchain.Parse(bytes.Clone(line))
		if err != nil || rec.Entry == nil {
			return err
		}
		var e struct {
			Who, Roles, Method, Code, Peer string
			Change                         bool
		}
		if err := json.Unmarshal(rec.Entry, &e); err != nil {
			return err
		}
		switch {
		case e.Method == trustv1.Claim_Claim_FullMethodName && e.Code == "OK":
			claims++
		case e.Method == trustv1.Trust_MintToken_FullMethodName && e.Code == "OK" && e.Who == "ann" && e.Roles == "admin" && e.Change && e.Peer != "":
			minted++
		}
		return nil
	}))
	if r := v.Report(true); r.Problems != nil || minted != callers*each || claims != 1 {
		t.Errorf("%d calls and %d claims are recorded, want %d and 1; %+v", minted, claims, callers*each, r)
	}
}
