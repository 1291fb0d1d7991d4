package boot

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

var wanted = [3]guid{
	{0x4f, 0x68, 0xbc, 0xe3, 0xe8, 0xcd, 0x4d, 0xb1, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09},
	{0x2c, 0x73, 0x57, 0xed, 0xeb, 0xd2, 0x46, 0xd9, 0xae, 0xc1, 0x23, 0xd4, 0x37, 0xec, 0x2b, 0xf5},
}

// diskWith is a disk with partitions of these GUIDs, encoded by the package that storaged uses.
func diskWith(t testing.TB, guids ...guid) []byte {
	table := gpt.Table{DiskGUID: gpt.GUID{1}}
	for i, g := range guids {
		first := uint64(gpt.FirstUsable + 10*i)
		table.Partitions = append(table.Partitions, gpt.Partition{Number: 2*i + 1, Type: gpt.GUID{2}, GUID: gpt.GUID(g), First: first, Last: first + 9, Name: "x"})
	}
	disk := make([]byte, 1<<20)
	chunks, err := table.Encode(int64(len(disk)))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		copy(disk[c.Offset:], c.Data)
	}
	return disk
}

func find(disk []byte) ([3]int, error) {
	return locate(bytes.NewReader(disk), 512, uint64(len(disk)/512), wanted)
}

func TestLocate(t *testing.T) {
	if got := wanted[0].String(); got != "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" {
		t.Errorf("text is %s", got)
	}
	good := diskWith(t, guid{9}, wanted[0], wanted[1])
	if got, err := find(good); err != nil || got != [3]int{3, 5} {
		t.Errorf("got %v, %v; want partitions 3 and 5", got, err)
	}
	third := guid{7, 7}
	for _, c := range []struct {
		guids []guid
		want  [3]int
	}{{[]guid{third, wanted[0], wanted[1]}, [3]int{3, 5, 1}}, {[]guid{{9}, wanted[0], wanted[1]}, [3]int{3, 5, 0}}} {
		disk := diskWith(t, c.guids...)
		if got, err := locate(bytes.NewReader(disk), 512, uint64(len(disk)/512), [3]guid{wanted[0], wanted[1], third}); err != nil || got != c.want {
			t.Errorf("got %v, %v; want %v", got, err, c.want)
		}
	}
	damaged := bytes.Clone(good)
	damaged[512+60]++
	if got, err := find(damaged); err != nil || got != [3]int{3, 5} {
		t.Errorf("with a damaged first table: %v, %v; want the one at the end", got, err)
	}
	if _, err := find(diskWith(t, wanted[0])); err == nil {
		t.Error("found two where there is one")
	}
	if _, err := find(make([]byte, 1<<20)); err == nil {
		t.Error("found something on an empty disk")
	}
	if _, err := locate(bytes.NewReader(good), 100, 10, wanted); err == nil {
		t.Error("accepted blocks of 100 bytes")
	}
}

// Whatever stands on a disk, reading it neither panics nor reads without bound, and a table is believed only with right sums.
func FuzzLocate(f *testing.F) {
	f.Add(diskWith(f, wanted[0], wanted[1])[:1<<15], uint16(512))
	testfuzz.Run(f, func(t *testing.T, disk []byte, block uint16) {
		numbers, err := locate(bytes.NewReader(disk), uint64(block), uint64(len(disk))/max(uint64(block), 1), wanted)
		if err == nil && (numbers[0] == 0 || numbers[1] == 0) {
			t.Errorf("no error, and partitions %v", numbers)
		}
	})
}

// A header with right sums but impossible values must not be followed.
func TestReadTableRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		at    int
		value uint64
	}{
		"another place": {24, 7}, "entries in the header": {72, 1}, "entries behind the disk": {72, 1 << 40},
		"no entries": {80, 0}, "many entries": {80, 1 << 30}, "short entries": {84, 64}, "odd entries": {84, 129},
	} {
		disk := diskWith(t, wanted[0], wanted[1])
		h := disk[512:]
		if c.at == 80 || c.at == 84 {
			binary.LittleEndian.PutUint32(h[c.at:], uint32(c.value))
		} else {
			binary.LittleEndian.PutUint64(h[c.at:], c.value)
		}
		reseal(h)
		if _, _, err := readTable(bytes.NewReader(disk), 512, uint64(len(disk)/512), 1); err == nil || !strings.Contains(err.Error(), "impossible") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// superblockOf is what veritysetup writes for 3 blocks of 4096 bytes with a salt of 2.
func superblockOf() []byte {
	b := make([]byte, superblockSize)
	copy(b, "verity\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00")
	copy(b[32:], "sha256")
	binary.LittleEndian.PutUint32(b[64:], 4096)
	binary.LittleEndian.PutUint32(b[68:], 4096)
	binary.LittleEndian.PutUint64(b[72:], 3)
	binary.LittleEndian.PutUint16(b[80:], 2)
	copy(b[88:], "\xab\xcd")
	return b
}

func TestSuperblock(t *testing.T) {
	s, err := parseSuperblock(superblockOf(), 3*4096, 2*4096)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.table("254:1", "254:2", "beef"), "1 254:1 254:2 4096 4096 3 1 sha256 beef abcd"; got != want {
		t.Errorf("table is %q, want %q", got, want)
	}
	if s.sectors() != 24 {
		t.Errorf("%d sectors, want 24", s.sectors())
	}
	s.salt = nil
	if got := s.table("1:1", "1:2", "00"); !strings.HasSuffix(got, " 00 -") {
		t.Errorf("without a salt: %q", got)
	}
	le := binary.LittleEndian
	for name, spoil := range map[string]func(b []byte) (root, tree uint64){
		"magic":            func(b []byte) (uint64, uint64) { b[0] = 0; return 1 << 20, 1 << 20 },
		"version":          func(b []byte) (uint64, uint64) { b[8] = 2; return 1 << 20, 1 << 20 },
		"hash type":        func(b []byte) (uint64, uint64) { b[12] = 0; return 1 << 20, 1 << 20 },
		"algorithm":        func(b []byte) (uint64, uint64) { copy(b[32:], "sha1\x00\x00"); return 1 << 20, 1 << 20 },
		"data block":       func(b []byte) (uint64, uint64) { le.PutUint32(b[64:], 4095); return 1 << 20, 1 << 20 },
		"hash block":       func(b []byte) (uint64, uint64) { le.PutUint32(b[68:], 1<<31); return 1 << 20, 1 << 20 },
		"no data":          func(b []byte) (uint64, uint64) { le.PutUint64(b[72:], 0); return 1 << 20, 1 << 20 },
		"overflowing data": func(b []byte) (uint64, uint64) { le.PutUint64(b[72:], 1<<63); return 1 << 20, 1 << 20 },
		"salt":             func(b []byte) (uint64, uint64) { le.PutUint16(b[80:], 257); return 1 << 20, 1 << 20 },
		"small root":       func(b []byte) (uint64, uint64) { return 3*4096 - 1, 1 << 20 },
		"small tree":       func(b []byte) (uint64, uint64) { return 1 << 20, 4096 },
	} {
		b := superblockOf()
		root, tree := spoil(b)
		if _, err := parseSuperblock(b, root, tree); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// An accepted superblock never leads the kernel outside the two partitions.
func FuzzSuperblock(f *testing.F) {
	f.Add(superblockOf(), uint64(3*4096), uint64(2*4096))
	testfuzz.Run(f, func(t *testing.T, b []byte, root, tree uint64) {
		if s, err := parseSuperblock(b, root, tree); err == nil && (s.sectors() > root/512 || s.hashBlock > tree || len(s.salt) > 256) {
			t.Errorf("accepted %+v for %d and %d bytes", s, root, tree)
		}
	})
}

func TestRootHash(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	for line, want := range map[string]string{
		"bulkhead bulkhead.verity=" + hash + " quiet": hash,
		"bulkhead.verity=" + strings.ToUpper(hash):    hash,
		"bulkhead": "", "bulkhead.verity=": "", "bulkhead.verity=" + hash[1:]: "", "bulkhead.verity=" + hash + "00": "",
		"bulkhead.verity=" + strings.Repeat("xy", 32): "", "bulkhead.verity=" + hash + " bulkhead.verity=" + hash: "",
	} {
		if got, err := rootHash(line); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", line, got, err, want)
		}
	}
}

func TestDMMessage(t *testing.T) {
	b := dmMessage("name", 24, "verity", "1 2 3")
	if len(b)%8 != 0 || binary.LittleEndian.Uint32(b[12:]) != uint32(len(b)) || b[len(b)-1] != 0 ||
		!bytes.HasPrefix(b[48:], []byte("name\x00")) || !bytes.HasPrefix(b[312+24:], []byte("verity\x00")) || !bytes.HasPrefix(b[312+40:], []byte("1 2 3\x00")) {
		t.Errorf("message is %x", b)
	}
	if len(dmMessage("name", 0, "", "")) != dmHeader {
		t.Error("a message without a target has one")
	}
}

// reseal makes a changed header's checksum right again.
func reseal(h []byte) {
	clear(h[16:20])
	binary.LittleEndian.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
}
