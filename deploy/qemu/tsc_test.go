package qemu

import "testing"

func TestTSCRate(t *testing.T) {
	const amd = "processor\t: 0\nflags\t\t: fpu tsc constant_tsc nonstop_tsc\nbogomips\t: 5192.24\nprocessor\t: 1\nflags\t\t: fpu tsc constant_tsc\nbogomips\t: 5192.24\n"
	for _, test := range []struct {
		name, cpuinfo string
		want          int
	}{
		{"two processors at one rate", amd, 2596120},
		{"a counter that follows the processor's clock", "flags\t\t: fpu tsc\nbogomips\t: 5192.24\n", 0},
		{"another architecture", "BogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", 0},
		{"nonsense", "flags : constant_tsc\nbogomips : many\n", 0},
		{"nothing", "", 0},
	} {
		if got := tscRate(test.cpuinfo); got != test.want {
			t.Errorf("%s: %d kHz, want %d", test.name, got, test.want)
		}
	}
	if got := clockArgs(0); got != "" {
		t.Errorf("an unknown rate gives %q: the kernel must measure and watch", got)
	}
}
