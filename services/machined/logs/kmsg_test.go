package logs

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestKmsgRecord(t *testing.T) {
	for _, c := range []struct {
		in    string
		level int
		at    time.Duration
		text  string
		ok    bool
	}{
		{"6,339,5140900,-;eth0: up; again\n SUBSYSTEM=net\n", 6, 5140900 * time.Microsecond, "eth0: up; again", true},
		{"31,1,7,c;init: bulkhead: x\n", 7, 7 * time.Microsecond, "init: bulkhead: x", true},
		{"4,1,0,-,caller=T1;\n", 4, 0, "", true},
		{"", 0, 0, "", false}, {"6;x\n", 0, 0, "", false}, {"a,1,1,-;x\n", 0, 0, "", false}, {"6,1,-1,-;x\n", 0, 0, "", false}, {"6,1,99999999999999999999,-;x\n", 0, 0, "", false},
	} {
		level, at, text, ok := kmsgRecord(c.in)
		if level != c.level || at != c.at || text != c.text || ok != c.ok {
			t.Errorf("%q: %d, %s, %q, %v", c.in, level, at, text, ok)
		}
	}
}

// TestKmsg reads what looks like the device: the kernel hands out one record at a time, a file all that fits, of which the first counts.
func TestKmsg(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kmsg")
	if err := os.WriteFile(file, []byte("3,1,2000000,-;disk \xff\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := OpenKmsg(file)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	for range 2 { // the second time there is nothing new
		var got []Line
		if err := k.Read(time.Unix(10, 0), func(level int, l Line) { got = append(got, l) }); err != nil {
			t.Fatal(err)
		}
		if len(got) == 1 && got[0] != (Line{time.Unix(12, 0), "disk ?"}) || len(got) > 1 {
			t.Errorf("got %+v", got)
		}
	}
	if _, err := OpenKmsg(file + ".none"); err == nil {
		t.Error("no error")
	}
}
