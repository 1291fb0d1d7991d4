package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"

	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
)

// An upgradeView shows how far an upgrade is: on a terminal one line, written again and again; elsewhere a line for each step, and for each
// quarter of it; as JSON each message.
type upgradeView struct {
	a     *app
	w     io.Writer
	width int                       // of the terminal; 0: there is none
	last  *updatev1.UpgradeProgress // nil before the first
	told  string                    // step and quarter of the last line
}

func (a *app) upgradeView() *upgradeView { return &upgradeView{a: a, w: a.out, width: a.width()} }

func (v *upgradeView) show(p *updatev1.UpgradeProgress) error {
	v.last = p
	if v.a.format != "table" {
		return v.a.printMessage(p)
	}
	line := progressLine(p)
	if v.width > 0 {
		_, err := fmt.Fprintf(v.w, "\r\x1b[K%s", cut(line, v.width-1))
		return err
	}
	quarter := uint64(0)
	if p.GetTotalBytes() > 0 {
		quarter = 4 * p.GetDoneBytes() / p.GetTotalBytes()
	}
	if told := fmt.Sprint(p.GetStep(), quarter, p.GetNote()); told != v.told {
		v.told = told
		_, err := fmt.Fprintln(v.w, line)
		return err
	}
	return nil
}

// end leaves the line alone.
func (v *upgradeView) end() {
	if v.width > 0 && v.last != nil && v.a.format == "table" {
		fmt.Fprintln(v.w)
	}
}

// words are the steps as people see them.
var words = map[string]string{
	"look": "look at the image", "compare": "compare with what the node has", "fetch": "fetch", "verify": "read back and verify", "done": "installed",
}

func progressLine(p *updatev1.UpgradeProgress) string {
	seconds := func(s float64) string { return round(time.Duration(s * float64(time.Second))) }
	var b strings.Builder
	fmt.Fprintf(&b, "%5s  %s", seconds(p.GetElapsedSeconds()), words[p.GetStep()])
	if p.GetVersion() != "" {
		fmt.Fprintf(&b, " %s", p.GetVersion())
	}
	if p.GetTotalBytes() > 0 {
		fmt.Fprintf(&b, ": %d %%", 100*p.GetDoneBytes()/p.GetTotalBytes())
		if p.GetStep() == "fetch" {
			fmt.Fprintf(&b, " of %s", bytesText(p.GetTotalBytes()))
			if p.GetFetchBytes() < p.GetImageBytes() {
				fmt.Fprintf(&b, " (the node has the rest of %s)", bytesText(p.GetImageBytes()))
			}
		}
	}
	if left := p.GetExpectedSeconds() - p.GetElapsedSeconds(); left >= 1 {
		fmt.Fprintf(&b, ", about %s left", seconds(left))
	}
	if p.GetNote() != "" {
		fmt.Fprintf(&b, " · %s", oneLine(p.GetNote()))
	}
	return b.String()
}

func getUpdate(ctx context.Context, conn *grpc.ClientConn) (*updatev1.Status, error) {
	return updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
}

func watchUpdate(ctx context.Context, conn *grpc.ClientConn, f func(*updatev1.Status) error) error {
	s, err := updatev1.NewUpdateClient(conn).WatchStatus(ctx, &updatev1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	return receive(s, f)
}

// tries says how often a version may still be tried: "2 of 3".
func tries(s *updatev1.Slot) string {
	if s.GetStatus() != "on trial" && s.GetStatus() != "failed" {
		return ""
	}
	return fmt.Sprintf("%d of %d", s.GetTriesLeft(), s.GetTriesLeft()+s.GetTriesDone())
}

// updateResources are those of "bhctl get" about versions.
func updateResources() map[string]resource {
	return map[string]resource{
		"slots": of("versions of the system", []string{"SLOT", "VERSION", "STATUS", "RUNNING", "NEXT", "TRIES LEFT", "EPOCH", "DETAIL"}, getUpdate, watchUpdate,
			(*updatev1.Status).GetSlots, func(s *updatev1.Slot) []string {
				return []string{s.Name, s.Version, s.Status, yes(s.Running), yes(s.Next), tries(s), fmt.Sprint(s.Epoch), oneLine(s.Detail)}
			}),
		"versions": of("what was installed, tried, found good and left, newest first", []string{"TIME", "WHAT", "VERSION", "BY", "DETAIL"}, getUpdate, watchUpdate,
			(*updatev1.Status).GetHistory, func(h *updatev1.History) []string {
				return []string{h.Time.AsTime().Local().Format(time.DateTime), h.What, h.Version, h.By, oneLine(h.Detail)}
			}),
	}
}
