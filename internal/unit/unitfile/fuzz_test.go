package unitfile

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzParse: a unit file is a unit that PID 1 can run, or is refused with a sentence.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"../../../*/unit.json", "../../../services/*/*unit.json", "../../../init/testdata/vm/units/*.json"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Add([]byte(`{"name": "a", "memory_max": "99999999999999G", "umask": "-1", "stop_timeout": "-1s"}`))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		u, err := Parse(data)
		if err != nil {
			if text := err.Error(); text == "" || strings.Contains(text, "%!") || len(text) > 8<<10+len(data) {
				t.Errorf("%q is refused with %q", data, text)
			}
			return
		}
		again, err := Parse(data)
		if err != nil || !reflect.DeepEqual(u, again) {
			t.Errorf("%q is read as %+v, and then %+v, %v", data, u, again, err)
		}
		if u.Name == "" || len(u.Name) > 31 || !utf8.ValidString(u.Name) || len(u.Exec) == 0 || !filepath.IsAbs(u.Exec[0]) || u.StartTimeout < 0 || u.StopTimeout < 0 ||
			u.Umask > 0o777 || u.Runtime > 0o7777 || u.Restart != "always" && u.Restart != "on-failure" && u.Restart != "never" {
			t.Errorf("%q is accepted as %+v", data, u)
		}
	})
}
