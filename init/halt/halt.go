// Package halt ends everything in order, and the machine. No step can hold it up for ever: each has a deadline, and who misses
// it is named.
package halt

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

const (
	pods      = "/sys/fs/cgroup/bulkhead/workload/kubepods"
	podGrace  = 5 * time.Second // between TERM and KILL
	restGrace = 2 * time.Second // the same, for what is left of all others
	killGrace = 2 * time.Second
	diskLimit = 20 * time.Second
	look      = 20 * time.Millisecond
)

// Order returns the units' names in groups: those of a group are stopped together, the groups one after the other. What uses
// others goes first: Kubernetes, then what runs its containers, then the daemons, and storaged, whose mounts all stand on, last.
func Order(units []string) (groups [4][]string) {
	for _, name := range units {
		g := 2
		switch {
		case name == "kubelet" || strings.HasPrefix(name, "kube-"):
			g = 0
		case name == "containerd":
			g = 1
		case name == "storaged":
			g = 3
		}
		groups[g] = append(groups[g], name)
	}
	return groups
}

// All stops every unit with drain, which returns those that do not end, and then restarts or turns off the machine. If there are words,
// they are the last ones: the kernel panics, which keeps them, and restarts. feed keeps the hardware watchdog quiet. It does not return.
func All(units []string, drain func([]string) []string, feed func(), powerOff bool, words string) {
	for i, group := range Order(units) {
		if stuck := drain(group); len(stuck) > 0 {
			console.Say("bulkhead: going on without waiting for ", strings.Join(stuck, ", "))
		}
		if i == 0 {
			stopPods()
		}
	}
	feed()
	stopRest()
	for range 2 { // once more, for mounts that others stood on
		unmount(feed)
	}
	feed() // for the last time: what hangs now is ended by the watchdog
	within("write all buffers", unix.Sync)
	if words != "" {
		console.End("bulkhead: ", words)
	}
	what, cmd := "restarting", unix.LINUX_REBOOT_CMD_RESTART
	if powerOff {
		what, cmd = "turning off", unix.LINUX_REBOOT_CMD_POWER_OFF
	}
	console.Say("bulkhead: ", what)
	err := unix.Reboot(cmd)
	console.GiveUp("bulkhead: ", what, ": ", err.Error())
}

// until asks again and again, and returns false when the time is up.
func until(limit time.Duration, done func() bool) bool {
	for end := time.Now().Add(limit); !done(); time.Sleep(look) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// within does what may hang.
func within(what string, do func()) {
	done := make(chan bool, 1)
	go func() { do(); done <- true }()
	select {
	case <-done:
	case <-time.After(diskLimit):
		console.Say("bulkhead: cannot ", what, " within ", console.Seconds(diskLimit), ", going on without")
	}
}

func stopPods() {
	n := signalGroup(pods, unix.SIGTERM)
	if n == 0 {
		return
	}
	console.Say("bulkhead: stopping ", strconv.Itoa(n), " processes of pods")
	empty := func() bool {
		reap()
		events, err := os.ReadFile(pods + "/cgroup.events")
		return err != nil || strings.Contains(string(events), "populated 0")
	}
	if !until(podGrace, empty) {
		os.WriteFile(pods+"/cgroup.kill", []byte("1"), 0)
		until(killGrace, empty)
	}
}

// signalGroup signals every process below a control group and returns how many there were.
func signalGroup(dir string, sig unix.Signal) (n int) {
	procs, _ := os.ReadFile(dir + "/cgroup.procs")
	for _, p := range strings.Fields(string(procs)) {
		if pid, err := strconv.Atoi(p); err == nil && pid > 1 && unix.Kill(pid, sig) == nil {
			n++
		}
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			n += signalGroup(dir+"/"+e.Name(), sig)
		}
	}
	return n
}

// reap takes all that have ended and says whether PID 1 has no child any more, and so nobody else is left.
func reap() (alone bool) {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if pid <= 0 && err != unix.EINTR {
			return err == unix.ECHILD
		}
	}
}

func stopRest() {
	unix.Kill(-1, unix.SIGTERM)
	if !until(restGrace, reap) {
		unix.Kill(-1, unix.SIGKILL)
		if !until(killGrace, reap) {
			console.Say("bulkhead: some processes do not die; going on")
		}
	}
}

// unmount takes off what has something to lose, newest first, and makes read-only what stays.
func unmount(feed func()) {
	text, _ := os.ReadFile("/proc/thread-self/mountinfo")
	all := console.Mounts(text)
	for i := len(all) - 1; i > 0; i-- {
		m := all[i]
		if m.Point != "/" && (m.FS == "overlay" || strings.HasPrefix(m.Source, "/dev/") && m.FS != "squashfs") {
			feed()
			within("unmount "+m.Point, func() {
				if err := unix.Unmount(m.Point, 0); err != nil {
					console.Say("bulkhead: ", m.Point, " stays mounted, read-only if it can be: ", err.Error())
					unix.Mount("", m.Point, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
				}
			})
		}
	}
}
