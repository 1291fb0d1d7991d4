package slots

import (
	"slices"
	"testing"
)

func TestNames(t *testing.T) {
	for file, want := range map[string]Name{
		"bulkhead_0001_0.1.0.efi":         {Sequence: 1, Version: "0.1.0"},
		"bulkhead_0012_0.2.0-rc.1+3.efi":  {12, "0.2.0-rc.1", true, 3, 0},
		"bulkhead_0012_0.2.0-dev+2-1.efi": {12, "0.2.0-dev", true, 2, 1},
		"bulkhead_0007_1.2.3+0-3.efi":     {7, "1.2.3", true, 0, 3},
		"bulkhead_12345_1.2.3.efi":        {Sequence: 12345, Version: "1.2.3"},
	} {
		got, ok := ParseName(file)
		if !ok || got != want || got.String() != file {
			t.Errorf("%s: %+v, %v, and back %s", file, got, ok, got)
		}
	}
	for _, bad := range []string{"", "bulkhead.next", "bulkhead_0001_0.1.0", "bulkhead_0000_0.1.0.efi", "bulkhead_1.0.0.efi", "bulkhead_0001_x.efi",
		"bulkhead_0001_0.1.0+.efi", "bulkhead_0001_0.1.0+3-.efi", "bulkhead_0001_0.1.0+x.efi", "bulkhead_0001_0.1.0+-1.efi", "bulkhead_-1_0.1.0.efi", "Bulkhead_0001_0.1.0.efi", "linux.efi"} {
		if n, ok := ParseName(bad); ok {
			t.Errorf("%q is read as %+v", bad, n)
		}
	}
	n := Name{5, "1.0.0", true, 2, 1}
	for got, want := range map[Name]string{n.good(): "bulkhead_0005_1.0.0.efi", n.givenUp(): "bulkhead_0005_1.0.0+0-9.efi", n.trial(9): "bulkhead_0009_1.0.0+3.efi"} {
		if got.String() != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// systemd-boot's order, first to start first.
func TestOrder(t *testing.T) {
	want := []string{
		"bulkhead_10000_0.1.0.efi",
		"bulkhead_0010_0.1.0+1-2.efi",
		"bulkhead_0009_9.9.9.efi",
		"bulkhead_0002_0.2.0+3.efi",
		"bulkhead_0001_0.10.0.efi",
		"bulkhead_0001_0.9.0.efi",
		"arch.efi",
		"bulkhead_0011_0.3.0+0-3.efi",
		"bulkhead_0003_0.3.0+0-3.efi",
		"bulkhead_0002_0.9.0+0.efi",
	}
	for seed := range len(want) {
		got := slices.Clone(want)
		for i := range got { // some other order, always the same
			j := (i*7 + seed) % len(got)
			got[i], got[j] = got[j], got[i]
		}
		if Order(got); !slices.Equal(got, want) {
			t.Errorf("got %v", got)
		}
	}
}

// Examples of the specification UAPI.10, oldest first.
func TestCompareNames(t *testing.T) {
	for _, sorted := range [][]string{
		{"122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"},
		{"1_", "1_2", "1_10"},
		{"a", "b", "1", "01.1", "1.2", "1.10"},
	} {
		for i, a := range sorted {
			for j, b := range sorted {
				got, want := compareNames(a, b), min(1, max(-1, i-j))
				if min(1, max(-1, got)) != want {
					t.Errorf("compare(%q, %q) = %d, want %d", a, b, got, want)
				}
			}
		}
	}
	if compareNames("1_1", "1+01") != 0 {
		t.Error("separators or zeros count")
	}
}
