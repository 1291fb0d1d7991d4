package secret

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestHidden(t *testing.T) {
	s := From([]byte("hunter2"))
	in := struct{ Key Bytes }{s}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", s, "in", in)
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	all := log.String() + string(text) + s.String()
	for _, verb := range []string{"%v", "%s", "%q", "%x", "%X", "%d", "%#v", "%+v"} {
		all += fmt.Sprintf(verb, s) + fmt.Sprintf(verb, in) + fmt.Sprintf(verb, &s) + fmt.Sprintf(verb, []Bytes{s})
	}
	for _, leak := range []string{"hunter2", "68756e74657232", "68 75", "104 117", "104, 117", "0x68", "aHVudGVyMg"} {
		if strings.Contains(all, leak) {
			t.Errorf("%q is in %s", leak, all)
		}
	}
}

func TestWipe(t *testing.T) {
	b := []byte("hunter2")
	s := From(b)
	c := s.Copy()
	if !s.Equal(c) || s.Equal(New(7)) || s.Equal(From([]byte("hunter"))) {
		t.Error("Equal is wrong")
	}
	s.Wipe()
	if !bytes.Equal(b, make([]byte, 7)) || string(c.Expose()) != "hunter2" {
		t.Errorf("wiped: %q, its copy: %q", b, c.Expose())
	}
}
