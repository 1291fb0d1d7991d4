package boot

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

const (
	noExec  = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	newRoot = "/root"

	diskLimit = 30 * time.Second      // a disk that takes longer to appear is not there
	diskNews  = 5 * time.Second       // between two lines about the wait
	diskPause = 10 * time.Millisecond // between two looks
)

// first is what the steps of stage 1 pass on.
type first struct {
	hash string // root hash, in hex
	root device
	tree device // the VERITY partition
	node string // of the verified device
}

// A device is a partition as the kernel knows it.
type device struct {
	name  string // vda1
	dev   string // 254:1
	bytes uint64
}

// First runs in the initramfs and ends in the verified root's own init. It does not return.
func First() {
	s := &first{}
	steps := mountSteps([]mount{ // /proc is there: see Ordered
		{target: "/sys", fs: "sysfs", flags: noExec},
		{target: "/dev", fs: "devtmpfs", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=0755"},
	})
	run(append(steps,
		step{"open the console", openConsole, "the kernel's option console="},
		step{"read the root hash", s.readHash, "the kernel command line: it needs bulkhead.verity=<64 hex digits>, once"},
		step{"use small pages", smallPages, "/sys/kernel/mm/transparent_hugepage"},
		step{"load modules", func() (string, error) { return modules("/modules.list", "") }, "the initramfs: /modules.list"},
		step{"find the root partition", s.find, "the disk: is it attached, is its driver among the modules, and is it of this kernel's image?"},
		step{"verify the root", s.verify, "the VERITY partition: it must be of the same image as the kernel"},
		step{"mount the root", s.mount, "the lines of the kernel above: a damaged block shows as device-mapper: verity"},
		step{"change to the root", s.enter, "the root: it needs the folders /proc, /sys and /dev, and /sbin/init"},
	))
}

func openConsole() (string, error) {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	for i := 0; i <= 2 && err == nil; i++ {
		err = unix.Dup3(fd, i, 0)
	}
	return "", err
}

// smallPages leaves huge pages to programs that ask for them. Where everybody gets them, as Debian has it, each small Go program,
// PID 1 too, takes two megabytes for its first kilobyte of heap. It counts for programs started after it.
func smallPages() (string, error) {
	err := os.WriteFile("/sys/kernel/mm/transparent_hugepage/enabled", []byte("madvise"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return "", err
}

func (s *first) readHash() (string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err == nil {
		s.hash, err = rootHash(string(line))
	}
	return "", err
}

func rootHash(line string) (string, error) {
	found := ""
	for _, word := range strings.Fields(line) {
		hash, ok := strings.CutPrefix(word, "bulkhead.verity=")
		if !ok {
			continue
		}
		if _, err := fromHex(hash); err != nil || len(hash) != 2*digestSize {
			return "", errors.New("bulkhead.verity=" + strconv.Quote(hash) + " is not 64 hex digits")
		}
		if found != "" {
			return "", errors.New("bulkhead.verity stands there twice")
		}
		found = strings.ToLower(hash)
	}
	if found == "" {
		return "", errors.New("bulkhead.verity is missing")
	}
	return found, nil
}

// find waits until the two partitions are there whose GUIDs follow from the root hash.
func (s *first) find() (string, error) {
	raw, err := fromHex(s.hash)
	if err != nil {
		return "", err
	}
	want := [2]guid{guid(raw[:16]), guid(raw[16:])}
	start := time.Now()
	news, again := start.Add(diskNews), start
	var other []string // disks that are something else
	for {
		disks, _ := os.ReadDir("/sys/class/block")
		if now := time.Now(); now.After(again) { // a table may have been written meanwhile
			other, again = nil, now.Add(time.Second)
		}
		for _, d := range disks {
			if slices.Contains(other, d.Name()) {
				continue
			}
			pair, err := partitions(d.Name(), want)
			if err != nil {
				other = append(other, d.Name())
			} else if pair[0].name != "" && pair[1].name != "" {
				s.root, s.tree = pair[0], pair[1]
				return "", nil
			}
		}
		switch now := time.Now(); {
		case now.Sub(start) > diskLimit:
			return "", errors.New("no disk has a partition " + want[0].String() + "; there are " + strings.Join(other, " "))
		case now.After(news):
			news = now.Add(diskNews)
			console.Say("bulkhead: waiting for a disk with the partition ", want[0].String())
		}
		time.Sleep(diskPause)
	}
}

// partitions returns those of a disk that have these GUIDs, with empty names where the kernel does not show them yet.
// It is an error if this is no such disk.
func partitions(disk string, want [2]guid) (pair [2]device, err error) {
	sys := "/sys/class/block/" + disk + "/"
	if _, err := os.Stat(sys + "partition"); err == nil {
		return pair, errors.New("a partition")
	}
	sectors, err := number(sys + "size")
	if err != nil || sectors == 0 {
		return pair, errors.New("no size")
	}
	block, err := number(sys + "queue/logical_block_size")
	if err != nil {
		return pair, err
	}
	f, err := os.Open("/dev/" + strings.ReplaceAll(disk, "!", "/"))
	if err != nil {
		return pair, err
	}
	defer f.Close()
	numbers, err := locate(f, block, sectors*512/max(block, 512), want)
	if err != nil {
		return pair, err
	}
	entries, err := os.ReadDir(sys)
	if err != nil {
		return pair, err
	}
	for _, e := range entries {
		n, err := number(sys + e.Name() + "/partition")
		if err != nil {
			continue
		}
		for i := range pair {
			if n == uint64(numbers[i]) {
				dev, _ := os.ReadFile(sys + e.Name() + "/dev")
				size, _ := number(sys + e.Name() + "/size")
				pair[i] = device{e.Name(), strings.TrimSpace(string(dev)), size * 512}
			}
		}
	}
	return pair, nil
}

func number(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 63)
}

func (s *first) verify() (string, error) {
	f, err := os.Open("/dev/" + s.tree.name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var buf [superblockSize]byte
	if _, err = io.ReadFull(f, buf[:]); err != nil {
		return "", err
	}
	sb, err := parseSuperblock(buf[:], s.root.bytes, s.tree.bytes)
	if err != nil {
		return "", err
	}
	minor, err := createDevice("bulkhead-root", sb.sectors(), "verity", sb.table(s.root.dev, s.tree.dev, s.hash))
	s.node = "/dev/dm-" + strconv.Itoa(int(minor))
	return "", err
}

func (s *first) mount() (string, error) {
	os.Mkdir(newRoot, 0o755)
	err := unix.Mount(s.node, newRoot, "squashfs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, "")
	return "root verified (dm-verity, /dev/" + s.root.name + ")", err
}

// enter makes the verified root the root of everything, frees the initramfs, and becomes the root's own init.
func (s *first) enter() (string, error) {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return "", os.NewSyscallError("move "+dir, err)
		}
	}
	if err := empty("/"); err != nil {
		console.Say("bulkhead: the initramfs stays in memory: ", err.Error())
	}
	if err := unix.Chdir(newRoot); err != nil {
		return "", err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return "", os.NewSyscallError("move the root", err)
	}
	if err := unix.Chroot("."); err != nil {
		return "", err
	}
	if err := unix.Chdir("/"); err != nil {
		return "", err
	}
	// PID 1 is small: it collects its garbage early and needs one processor.
	return "", os.NewSyscallError("exec /sbin/init", unix.Exec("/sbin/init", []string{"init", "supervise"}, []string{"GOGC=10", "GOMAXPROCS=1"}))
}

// empty deletes what lies on the initramfs itself, if it is one.
func empty(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return errors.New(dir + " is not an initramfs")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if path := dir + e.Name(); path != newRoot {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}
