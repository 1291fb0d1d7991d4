package qemu

import (
	"os"
	"slices"
	"strconv"
	"strings"
)

// tscRate returns how fast this host's time stamp counter counts, in kHz, from the content of /proc/cpuinfo (arch/x86/kernel/cpu/proc.c);
// 0 if it does not count at one rate, or the file does not say. The kernel says it as "bogomips": two loops for each tick, in millions.
func tscRate(cpuinfo string) int {
	var constant bool
	var rate float64
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "flags":
			constant = slices.Contains(strings.Fields(value), "constant_tsc")
		case "bogomips":
			rate, _ = strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	if !constant || rate < 200 || rate > 40000 { // 0.1 to 20 GHz
		return 0
	}
	return int(rate * 500)
}

// hostTSC is tscRate of this host.
func hostTSC() int {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0
	}
	return tscRate(string(text))
}

// clockArgs tell an emulated guest's kernel how fast its time stamp counter counts, which is the host's. Left to itself it measures, and on a busy
// host it may measure a seventh: its clock then runs seven times too fast. Where the rate is unknown the kernel measures, and watches what it took.
func clockArgs(tsc int) string {
	if tsc == 0 {
		return ""
	}
	return " tsc=reliable tsc_early_khz=" + strconv.Itoa(tsc)
}
