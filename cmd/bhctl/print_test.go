package main

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
)

// JSON is stable: protojson by itself varies its spaces from build to build.
func TestJSONIsStable(t *testing.T) {
	got, err := toJSON([]proto.Message{&networkv1.Address{Link: "eth0", Address: "10.0.2.15/24"}, &networkv1.Address{}})
	if err != nil {
		t.Fatal(err)
	}
	want := `[
  {
    "link": "eth0",
    "address": "10.0.2.15/24",
    "origin": ""
  },
  {
    "link": "",
    "address": "",
    "origin": ""
  }
]
`
	if string(got) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, _ := toJSON([]proto.Message{}); string(got) != "[]\n" {
		t.Errorf("no items: %q, want []", got)
	}
}

func TestTableFits(t *testing.T) {
	tab := newTable("NAME", "DETAIL")
	tab.add("a", strings.Repeat("x", 100))
	tab.add("long name", "ü")
	var b strings.Builder
	if err := tab.write(&b, 20); err != nil {
		t.Fatal(err)
	}
	want := "NAME       DETAIL\na          xxxxxxxx…\nlong name  ü\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 << 30: "5.0 GiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
}
