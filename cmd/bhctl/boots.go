package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
)

// securityRow marks what the machine or its owner would have to bring with "no", and what the node itself should have done with "NO".
func securityRow(s *machinev1.SecuritySetting) []string {
	wanted, ok := s.Wanted, "yes"
	switch {
	case wanted == "":
		wanted, ok = "-", "-"
	case !s.Ok && s.Advisory:
		ok = "no"
	case !s.Ok:
		ok = "NO"
	}
	return []string{s.Name, wanted, s.Actual, ok, s.Why}
}

func bootRow(b *machinev1.Boot) []string {
	started := "-"
	if b.Started != nil {
		started = b.Started.AsTime().Local().Format(time.DateTime)
	}
	version, detail := b.Version, b.Detail
	if version == "" {
		version = "-"
	}
	if b.Id == "" {
		detail += fmt.Sprintf("; it was boot %d on its way down, or one that did not get as far as STATE", b.Number-1)
	}
	return []string{fmt.Sprint(b.Number), version, started, strings.ToLower(b.End.String()), detail}
}

// bootLog prints the last lines of a boot; source is a unit's name, or "" for everything.
func (a *app) bootLog(ctx context.Context, boot int64, source string, l lineFlags) error {
	return a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		s, err := machinev1.NewMachineClient(conn).StreamBootLog(ctx, &machinev1.StreamBootLogRequest{Boot: boot, Source: source, Tail: l.tail})
		if err != nil {
			return err
		}
		return receive(s, func(m *machinev1.BootLogLine) error {
			if a.format != "table" {
				return a.printMessage(m)
			}
			stamp := ""
			if l.times {
				stamp = m.Time.AsTime().Local().Format("2006-01-02 15:04:05.000 ")
			}
			_, err := fmt.Fprintf(a.out, "%s%s: %s\n", stamp, m.Source, m.Text)
			return err
		})
	})
}
