package main

import (
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
)

// notWell is a node that has no address.
func notWell() *machinev1.WhyResponse {
	now := time.Date(2026, 3, 1, 3, 0, 0, 0, time.Local)
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }
	return &machinev1.WhyResponse{Time: timestamppb.New(now), Node: "n1", Causes: []*machinev1.Cause{
		{Steps: []*machinev1.WhyStep{
			{Subject: "kubernetes.converged", Since: ago(12 * time.Minute), Text: "left to do:\nwait for node Ready and 3 more"},
			{Subject: "etcd.member", Since: ago(14 * time.Minute), Text: "the etcd member does not run"},
			{Subject: "networkd.address", Since: ago(30 * time.Hour), OrEarlier: true, Text: "the node has no address at which others could reach it: no DHCP server answers on eth0",
				Command: "bhctl get addresses"},
		}, Also: []string{"etcd.converged", "kubelet.up"}, Command: "bhctl get addresses"},
		{Steps: []*machinev1.WhyStep{{Subject: "gateway.up", Since: ago(40 * time.Second), Text: "waiting; ended last with: exit 2", Command: "bhctl logs gateway",
			LastWords: []string{"panic: assignment to entry in nil map"}}}, Command: "bhctl logs gateway"},
	}}
}

func TestWhyText(t *testing.T) {
	if got := whyText(&machinev1.WhyResponse{Healthy: true}, "") + versionsText(&updatev1.Status{}, nil, 5); got != "the node is well\n" {
		t.Errorf("got %q", got)
	}
	want := `the node is not well, for 2 reasons:

1. kubernetes.converged, since 02:48:00 (12m)
     left to do: wait for node Ready and 3 more
   because etcd.member, since 02:46:00 (14m)
     the etcd member does not run
   because networkd.address, since 2026-02-27 21:00:00 (30h) or before
     the node has no address at which others could reach it: no DHCP server
     answers on eth0
   try:  bhctl -n w1 get addresses
   also: etcd.converged, kubelet.up

2. gateway.up, since 02:59:20 (40s)
     waiting; ended last with: exit 2
     | panic: assignment to entry in nil map
   try:  bhctl -n w1 logs gateway
`
	got := whyText(notWell(), "w1")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	long := notWell()
	long.Causes[0].Steps[0].Text = strings.Repeat("wait for something ", 100)
	long.Causes[0].Also = strings.Fields(strings.Repeat("storaged.VAR.room ", 20))
	for _, l := range strings.Split(whyText(long, ""), "\n") {
		if utf8.RuneCountInString(l) > whyWidth {
			t.Errorf("%d columns: %s", utf8.RuneCountInString(l), l)
		}
	}
}

func TestVersionsText(t *testing.T) {
	st := &updatev1.Status{
		Slots:   []*updatev1.Slot{{Version: "0.2.0", Running: true}},
		Proofs:  []*updatev1.Proof{{Name: "api", Ok: true}, {Name: "etcd", Detail: "no leader"}},
		Failure: &updatev1.Failure{Version: "0.3.0", Tries: 3, Reason: "the kernel panicked: VFS", Lines: []string{"one", "two", "three"}},
	}
	got := versionsText(st, nil, 2)
	for _, want := range []string{"0.2.0 is on trial", "api       proved", "etcd      MISSING   no leader\n", "0.3.0 was left after 3 tries", ": the kernel panicked: VFS\n  | two\n  | three\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if strings.Contains(got, "one") {
		t.Error("more lines than asked for")
	}
	if got := versionsText(nil, errors.New("updated: does not answer"), 2); got != "\nnothing is known of versions: updated: does not answer\n" {
		t.Errorf("got %q", got)
	}
}
