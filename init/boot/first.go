package boot

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/init/watchdog"
)

const (
	newRoot   = "/root"
	rootName  = "bulkhead-root"
	diskLimit = 30 * time.Second      // a disk that takes longer to appear is not there
	diskNews  = 5 * time.Second       // between two lines about the wait
	diskPause = 10 * time.Millisecond // between two looks
	preferred = 3 * time.Second       // that the disk may take which the boot loader came from, when another has the root, too
)

// first is what the steps of stage 1 pass on.
type first struct {
	hash       string   // root hash, in hex
	root, tree device   // the partitions ROOT and VERITY
	node       string   // of the verified device
	passed     []string // see passedOn
	dog        watchdog.Dog
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
	const root = "the root: it needs the folders /proc, /sys and /dev, and /sbin/init"
	run(append(mountSteps([]mount{ // /proc is there: see Ordered
		{target: "/sys", fs: "sysfs", flags: noExec},
		{target: "/dev", fs: "devtmpfs", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=0755"},
	}),
		step{"open the console", openConsole, "the kernel's option console="},
		step{"read the root hash", s.readHash, "the kernel command line: it needs bulkhead.verity=<64 hex digits>, once"},
		step{"use small pages", func() error {
			// Huge pages are for programs that ask for them. Where everybody gets them, as Debian has it, each small Go program, PID 1
			// too, takes two megabytes for its first kilobyte of heap. Kernels without huge pages are fine.
			os.WriteFile("/sys/kernel/mm/transparent_hugepage/enabled", []byte("madvise"), 0)
			return nil
		}, ""},
		step{"load modules", s.modules, "the initramfs: /modules.list"},
		step{"find the root partition", s.find, "the disk: is it attached, is its driver among the modules, and is it of this kernel's image?"},
		step{"verify the root", s.verify, "the VERITY partition: it must be of the same image as the kernel"},
		step{"mount the root", s.mount, "the lines of the kernel above: a damaged block shows as device-mapper: verity"},
		step{"keep what the boot loader passed on", s.keepPassed, "the initramfs: /.extra"},
		step{"take /proc along", func() error { return move("/proc", newRoot+"/proc") }, root},
		step{"take /sys along", func() error { return move("/sys", newRoot+"/sys") }, root},
		step{"take /dev along", func() error { return move("/dev", newRoot+"/dev") }, root},
		step{"free the initramfs", freeInitramfs, "how the machine was started: this must be an initramfs"},
		step{"go to the root", func() error { return unix.Chdir(newRoot) }, root},
		step{"make it the root", func() error { return move(".", "/") }, root},
		step{"enter the root", func() error { return unix.Chroot(".") }, root},
		step{"start the root's init", func() error {
			// PID 1 is small: it collects its garbage early, and needs one processor.
			return unix.Exec("/sbin/init", []string{"init", "supervise", s.dog.Pass()}, append(s.passed, "GOGC=4", "GOMAXPROCS=1"))
		}, root}), &s.dog)
}

// passedOn are the two files that systemd's stub puts into the initramfs and that count: which PCR 11 the image's maker has signed. Whatever
// else is there came from the EFI partition, unsigned. They go to stage 2 in PID 1's environment, and from there to storaged.
var passedOn = []string{"tpm2-pcr-signature.json", "tpm2-pcr-public-key.pem"}

const maxPassed = 8 << 10 // bytes of each

func (s *first) keepPassed() error {
	for _, name := range passedOn {
		if b, err := os.ReadFile("/.extra/" + name); err == nil && len(b) <= maxPassed {
			s.passed = append(s.passed, name+"="+string(b))
		}
	}
	return nil // without a stub there is nothing
}

func move(from, to string) error { return unix.Mount(from, to, "", unix.MS_MOVE, "") }

func openConsole() error {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	for i := 0; i <= 2 && err == nil; i++ {
		err = unix.Dup3(fd, i, 0)
	}
	return err
}

// modules loads those of the initramfs: the watchdog's own are the first.
func (s *first) modules() error {
	const list = "/modules.list"
	loaded := func() { s.dog.Find(); s.dog.Feed() }
	start := time.Now()
	n, err := modules(list, "", false, loaded)
	if _, uefi := os.Stat("/sys/firmware/efi"); uefi != nil {
		m, merr := modules(list, "", true, loaded)
		n, err = n+m, errors.Join(err, merr)
	}
	sayModules(n, start)
	return err
}

func (s *first) readHash() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err == nil {
		s.hash, err = rootHash(string(line))
	}
	return err
}

func rootHash(line string) (found string, err error) {
	for _, word := range strings.Fields(line) {
		hash, ok := strings.CutPrefix(word, "bulkhead.verity=")
		if raw := fromHex(hash); ok && len(raw) != digestSize {
			return "", errors.New(strconv.Quote(hash) + " is not 64 hex digits")
		} else if ok && found != "" {
			return "", errors.New("it stands there twice")
		} else if ok {
			found = toHex(raw)
		}
	}
	if found == "" {
		return "", errors.New("there is none")
	}
	return found, nil
}

// find waits until the two partitions are there whose GUIDs follow from the root hash. An installation medium and the disk that was made from
// it both have them: then it is the disk that the boot loader was started from.
func (s *first) find() error {
	raw := fromHex(s.hash)
	want := [3]guid{guid(raw[:16]), guid(raw[16:]), loaderGUID()}
	start, news := time.Now(), diskNews
	for ; ; time.Sleep(diskPause) {
		s.dog.Feed()
		disks, _ := os.ReadDir("/sys/class/block")
		names, waited := "", time.Since(start)
		for _, d := range disks {
			pair, booted, err := partitions(d.Name(), want)
			if err == nil && (booted || want[2] == guid{} || waited > preferred) {
				s.root, s.tree = pair[0], pair[1]
				return nil
			}
			names += " " + d.Name()
		}
		if waited > diskLimit {
			return errors.New("no disk has a partition " + want[0].String() + "; block devices are:" + names)
		} else if waited > news {
			news += diskNews
			console.Say("bulkhead: waiting for a disk with the partition ", want[0].String())
		}
	}
}

// loaderGUID is that of the EFI partition that systemd-boot was started from, by its word; zero if it has none. It only chooses between disks whose
// roots are the same. The firmware's variables stay mounted: they go along to the root.
func loaderGUID() (g guid) {
	unix.Mount("efivarfs", variables, "efivarfs", noExec, "")
	b, _ := os.ReadFile(variables + "/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
	text := ""
	for i := 4; i < len(b); i += 2 { // UTF-16 behind the variable's attributes
		if c := b[i]; c != '-' && c != 0 {
			text += string(rune(c))
		}
	}
	copy(g[:], fromHex(text))
	return g
}

// partitions returns those of a disk that have the first two of these GUIDs, and whether the third is there, too.
func partitions(disk string, want [3]guid) (pair [2]device, third bool, err error) {
	const sys = "/sys/class/block/"
	f, err := os.Open("/dev/" + strings.ReplaceAll(disk, "!", "/"))
	if err != nil {
		return pair, false, err
	}
	defer f.Close()
	block := number(sys + disk + "/queue/logical_block_size") // partitions have no queue
	numbers, err := locate(f, block, number(sys+disk+"/size")*512/max(block, 512), want)
	for i := range pair {
		name := disk
		if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
			name += "p"
		}
		name += strconv.Itoa(numbers[i])
		pair[i] = device{name, text(sys + name + "/dev"), number(sys+name+"/size") * 512}
		if err == nil && pair[i].dev == "" {
			err = errors.New(name + " does not show yet")
		}
	}
	return pair, numbers[2] != 0, err
}

// text returns a file's content without the newline, "" if there is none.
func text(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

func number(path string) uint64 {
	n, _ := strconv.ParseUint(text(path), 10, 48)
	return n
}

func (s *first) verify() error {
	buf := make([]byte, superblockSize)
	f, err := os.Open("/dev/" + s.tree.name)
	if err == nil {
		defer f.Close()
		_, err = f.ReadAt(buf, 0)
	}
	sb, bad := parseSuperblock(buf, s.root.bytes, s.tree.bytes)
	if err = errors.Join(err, bad); err != nil {
		return err
	}
	minor, err := createDevice(rootName, "CRYPT-VERITY-"+s.hash[:32]+"-"+rootName, sb.sectors(), "verity", sb.table(s.root.dev, s.tree.dev, s.hash))
	s.node = "/dev/dm-" + strconv.Itoa(minor)
	return err
}

func (s *first) mount() error {
	os.Mkdir(newRoot, 0o755)
	err := unix.Mount(s.node, newRoot, "squashfs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, "")
	if err == nil {
		console.Say("bulkhead: root verified (dm-verity, /dev/", s.root.name, ")")
	}
	return err
}

// freeInitramfs deletes what the initramfs holds; nothing else is mounted any more but the new root.
func freeInitramfs() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil || st.Type != unix.RAMFS_MAGIC && st.Type != unix.TMPFS_MAGIC {
		return errors.New("/ is something else")
	}
	entries, err := os.ReadDir("/")
	for _, e := range entries {
		if path := "/" + e.Name(); path != newRoot && err == nil {
			err = os.RemoveAll(path)
		}
	}
	return err
}
