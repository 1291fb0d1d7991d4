package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// disk is a folder that forgets what was not synced. Each operation is several steps, and the power can go before each one.
type disk struct {
	inodes map[int]*inode
	names  map[string]int   // as programs see them
	log    []map[string]int // names after each change since the last sync; log[0] is what is on the disk
	next   int

	steps int // done so far
	cut   int // the power goes before this step; 0: never
	full  int // the step from which on writing fails with ENOSPC; 0: never
}

type inode struct{ seen, synced string }

var errCut = errors.New("power cut")

func newDisk() *disk {
	return &disk{inodes: map[int]*inode{}, names: map[string]int{}, log: []map[string]int{{}}}
}

func (d *disk) step(writes bool) error {
	d.steps++
	if d.cut != 0 && d.steps >= d.cut {
		return errCut
	}
	if writes && d.full != 0 && d.steps >= d.full {
		return syscall.ENOSPC
	}
	return nil
}

func (d *disk) change() { d.log = append(d.log, maps.Clone(d.names)) }

func (d *disk) Names() ([]string, error) {
	var out []string
	for n := range d.names {
		out = append(out, n)
	}
	return out, nil
}

func (d *disk) Read(name string, most int64) ([]byte, error) {
	i, ok := d.names[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(d.inodes[i].seen), nil
}

func (d *disk) Write(name string, data []byte) error {
	if err := d.step(true); err != nil {
		return err
	}
	if _, ok := d.names[name]; !ok {
		d.next++
		d.names[name], d.inodes[d.next] = d.next, &inode{}
		d.change()
	}
	node := d.inodes[d.names[name]]
	node.seen = ""
	for _, part := range []string{string(data[:len(data)/2]), string(data[len(data)/2:])} {
		if err := d.step(true); err != nil {
			return err
		}
		node.seen += part
	}
	if err := d.step(true); err != nil {
		return err
	}
	node.synced = node.seen
	return nil
}

func (d *disk) Rename(from, to string) error {
	if err := d.step(true); err != nil {
		return err
	}
	i, ok := d.names[from]
	if !ok {
		return fs.ErrNotExist
	}
	delete(d.names, from)
	d.names[to] = i
	d.change()
	return nil
}

func (d *disk) Remove(name string) error {
	if err := d.step(false); err != nil {
		return err
	}
	if _, ok := d.names[name]; !ok {
		return fs.ErrNotExist
	}
	delete(d.names, name)
	d.change()
	return nil
}

func (d *disk) Sync() error {
	if err := d.step(true); err != nil {
		return err
	}
	d.log = []map[string]int{maps.Clone(d.names)}
	return nil
}

// after returns every disk that there may be after the power went: any number of the last name changes is lost, and
// content that was not synced is there, is empty, or is half there.
func (d *disk) after() []*disk {
	var out []*disk
	for _, names := range d.log {
		for _, content := range []func(*inode) string{
			func(n *inode) string { return n.synced },
			func(n *inode) string { return n.seen },
			func(n *inode) string {
				if n.synced == n.seen {
					return n.seen
				}
				return n.seen[:len(n.seen)/2]
			},
		} {
			a := newDisk()
			for name, i := range names {
				a.names[name] = i
				a.inodes[i] = &inode{seen: content(d.inodes[i]), synced: content(d.inodes[i])}
				a.next = max(a.next, i)
			}
			a.log = []map[string]int{maps.Clone(a.names)}
			out = append(out, a)
		}
	}
	return out
}

func generation(n int) Generation {
	return Generation{Applied: time.Unix(int64(n), 0).UTC(), Caller: "admin", Name: "n.yaml", Documents: []byte(fmt.Sprintf("kind: %d\n", n))}
}

// filled returns a disk with n generations.
func filled(t *testing.T, n int) *disk {
	t.Helper()
	d := newDisk()
	s, err := Open(d)
	for i := range n {
		if err == nil {
			_, err = s.Add(generation(i + 1))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	d.steps = 0
	return d
}

func TestPowerCut(t *testing.T) {
	for _, have := range []int{0, 1, Keep - 1, Keep} { // with Keep, an old one is removed too
		for cut := 1; ; cut++ {
			d := filled(t, have)
			s, err := Open(d)
			if err != nil {
				t.Fatal(err)
			}
			d.cut = cut
			_, err = s.Add(generation(have + 1))
			for i, after := range d.after() {
				check(t, fmt.Sprintf("%d generations, cut before step %d, disk %d", have, cut, i), after, have, err == nil)
			}
			if err == nil && d.steps < cut {
				break
			}
			if err != nil && !errors.Is(err, errCut) {
				t.Fatalf("cut %d: %v", cut, err)
			}
		}
	}
}

// check wants the newest generation to be have or have+1, whole, only the latter if it was promised; and the next Add to work.
func check(t *testing.T, name string, d *disk, have int, promised bool) {
	t.Helper()
	s, err := Open(d)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	g, damaged := s.Newest()
	if len(damaged) > 0 {
		t.Errorf("%s: damaged: %v", name, damaged)
	}
	if got := int(g.Number); got != have && got != have+1 || promised && got != have+1 {
		t.Fatalf("%s: newest is %d of %d, promised %v", name, got, have+1, promised)
	}
	if g.Number > 0 && string(g.Documents) != fmt.Sprintf("kind: %d\n", g.Number) {
		t.Errorf("%s: generation %d holds %q", name, g.Number, g.Documents)
	}
	again, err := s.Add(generation(int(g.Number) + 1))
	if err != nil || again.Number != g.Number+1 {
		t.Errorf("%s: the next one is %d, %v", name, again.Number, err)
	}
}

func TestFull(t *testing.T) {
	for from := 1; from <= 6; from++ {
		d := filled(t, 3)
		s, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		d.full = from
		_, err = s.Add(generation(4))
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("full from step %d: got %v", from, err)
		}
		if g, damaged := s.Newest(); g.Number != 3 || damaged != nil {
			t.Errorf("full from step %d: newest is %d, %v", from, g.Number, damaged)
		}
		for _, after := range d.after() {
			check(t, fmt.Sprintf("full from step %d", from), after, 3, false)
		}
		if len(d.names) != 3 { // what was begun is taken away
			t.Errorf("full from step %d: left %v", from, d.names)
		}
		d.full = 0
		if g, err := s.Add(generation(4)); err != nil || g.Number != 4 {
			t.Errorf("full from step %d, then not: got %d, %v", from, g.Number, err)
		}
	}
}

func TestKeep(t *testing.T) {
	s, err := Open(filled(t, Keep+5))
	if err != nil {
		t.Fatal(err)
	}
	list := s.List()
	if len(list) != Keep || list[0].Number != Keep+5 || list[Keep-1].Number != 6 || list[0].Documents != nil {
		t.Errorf("got %d, first %+v", len(list), list[0])
	}
	if _, err := s.Load(5); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("generation 5: %v", err)
	}
}

func TestDamage(t *testing.T) {
	good, err := encode(Generation{Number: 3, Documents: []byte("kind: x\n")})
	if err != nil {
		t.Fatal(err)
	}
	for name, spoiled := range map[string]string{
		"empty":          "",
		"half":           string(good[:len(good)/2]),
		"one bit":        strings.Replace(string(good), "kind: x", "kind: y", 1),
		"longer":         string(good) + "x",
		"other number":   string(must(encode(Generation{Number: 4}))),
		"newer format":   strings.Replace(string(good), magic+"1", magic+"2", 1),
		"something else": strings.Repeat("x", 5000),
	} {
		d := filled(t, 3)
		d.inodes[d.names[fileName(3)]].seen = spoiled
		s, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		g, damaged := s.Newest()
		if g.Number != 2 || len(damaged) != 1 || !strings.HasPrefix(damaged[0].Error(), "generation 3: ") {
			t.Errorf("%s: newest is %d, %v", name, g.Number, damaged)
		}
		if s.Next() != 4 || len(s.List()) != 2 {
			t.Errorf("%s: next is %d, list has %d", name, s.Next(), len(s.List()))
		}
	}
}

func must(data []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return data
}

func TestFolder(t *testing.T) {
	parent := t.TempDir()
	f, err := OpenFolder(parent, "generations")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Write(temporary, []byte("left over")); err != nil {
		t.Fatal(err)
	}
	s, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := s.Add(generation(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	again, err := OpenFolder(parent, "generations")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	s, err = Open(again)
	if err != nil {
		t.Fatal(err)
	}
	g, damaged := s.Newest()
	if g.Number != 3 || string(g.Documents) != "kind: 3\n" || g.Caller != "admin" || !g.Applied.Equal(time.Unix(3, 0)) || damaged != nil {
		t.Errorf("got %+v, %v", g, damaged)
	}
	if _, err := os.Stat(filepath.Join(parent, "generations", temporary)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(must(encode(Generation{Number: 3, Documents: []byte("kind: x\n")})))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		g, err := decode(data)
		if err != nil {
			return
		}
		again, err := decode(must(encode(g)))
		if err != nil || string(again.Documents) != string(g.Documents) || again.Number != g.Number {
			t.Errorf("got %+v, %v, want %+v", again, err, g)
		}
	})
}
