// Command init is PID 1 of a test machine: it prints what the TPM and the firmware tell, and powers off.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	for _, m := range [][2]string{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := unix.Mount(m[1], m[0], m[1], 0, ""); err != nil {
			fmt.Println("TEST mount", m[0], err)
		}
	}
	console, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY, 0)
	if err != nil {
		panic(err)
	}
	for _, pcr := range []string{"7", "11", "12"} {
		text, _ := os.ReadFile("/sys/class/tpm/tpm0/pcr-sha256/" + pcr)
		fmt.Fprintln(console, "TEST pcr", pcr, strings.ToLower(strings.TrimSpace(string(text))))
	}
	line, _ := os.ReadFile("/proc/cmdline")
	fmt.Fprintf(console, "TEST cmdline [%s]\n", strings.TrimSpace(string(line)))
	extra, _ := filepath.Glob("/.extra/*")
	fmt.Fprintln(console, "TEST extra", extra)
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
