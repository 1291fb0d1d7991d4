package verity

import (
	"bytes"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func TestVerify(t *testing.T) {
	for _, blocks := range []int{1, 2, 129, 128*128 + 1} {
		d := data(blocks)
		tree, err := Build(bytes.NewReader(d), []byte("salt"), [16]byte{9})
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := tree.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		hashes := b.Bytes()
		slot, area := append(bytes.Clone(d), "remains"...), append(bytes.Clone(hashes), "remains"...)
		check := func(what, want string, d, hashes []byte, root [32]byte) {
			t.Helper()
			err := Verify(bytes.NewReader(d), int64(len(d)), bytes.NewReader(hashes), root)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%d blocks, %s: %v, want …%s…", blocks, what, err, want)
			}
		}
		flip := func(b []byte, at int) []byte { c := bytes.Clone(b); c[at] ^= 1; return c }
		check("all good", "", slot, area, tree.Root)
		check("first bit", "root hash", flip(slot, 0), area, tree.Root)
		check("last bit", "root hash", flip(slot, len(d)-1), area, tree.Root)
		check("another root", "root hash", slot, area, [32]byte{1})
		check("data short", "blocks are more than", d[:len(d)-BlockSize], area, tree.Root)
		check("no superblock", "no verity superblock", slot, flip(area, 0), tree.Root)
		check("another salt", "root hash", slot, flip(area, 88), tree.Root)
		if len(hashes) > BlockSize {
			check("tree's last bit", "hash tree is wrong in the block at", slot, flip(area, len(hashes)-1), tree.Root)
			check("tree's first bit", "hash tree is wrong in the block at byte 4096", slot, flip(area, BlockSize), tree.Root)
			check("tree short", "read the hash tree", slot, hashes[:len(hashes)-1], tree.Root)
		}
	}
}

func FuzzParseSuperblock(f *testing.F) {
	tree, err := Build(bytes.NewReader(data(3)), []byte("salt"), [16]byte{9})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tree.superblock())
	testfuzz.Run(f, func(t *testing.T, b []byte) {
		s, err := ParseSuperblock(b)
		if err != nil {
			return
		}
		again := (&Tree{blocks: s.Blocks, salt: s.Salt, uuid: s.UUID}).superblock()
		if o, err := ParseSuperblock(again); err != nil || o.Blocks != s.Blocks || !bytes.Equal(o.Salt, s.Salt) {
			t.Errorf("%+v is read again as %+v, %v", s, o, err)
		}
	})
}
