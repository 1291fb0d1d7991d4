package luks

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// memory is a device that keeps account of what is written between two flushes.
type memory struct {
	b       []byte
	pending []write
	rounds  [][]write // those that were flushed
}

type write struct {
	at   int64
	data []byte
}

func newMemory() *memory { return &memory{b: make([]byte, DataOffset+1<<20)} }

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	if at >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	m.pending = append(m.pending, write{at, bytes.Clone(p)})
	return copy(m.b[at:], p), nil
}

func (m *memory) Sync() error {
	m.rounds = append(m.rounds, m.pending)
	m.pending = nil
	return nil
}

// quick is a KDF for tests.
var quick = KDF{Type: "pbkdf2", Hash: "sha256", Iterations: 10}

func key(s string) secret.Bytes { return secret.From([]byte(s)) }

// volume makes one with a slot for each key.
func volume(t testing.TB, dev Device, keys ...string) (*Header, secret.Bytes) {
	t.Helper()
	h, vk, err := Format(dev, Options{Label: "test"})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if _, err := h.Update(dev, vk, Change{Add: key(k), KDF: quick, Token: Token{Type: "bulkhead-test", Fields: map[string]json.RawMessage{"of": json.RawMessage(`"` + k + `"`)}}}); err != nil {
			t.Fatal(err)
		}
	}
	return h, vk
}

// opens lists which of the keys open what Read finds.
func opens(t testing.TB, dev Device, vk secret.Bytes, keys ...string) (out []string) {
	t.Helper()
	h, _, err := Read(dev)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		got, _, err := h.Open(dev, key(k))
		switch {
		case err == nil && got.Equal(vk):
			out = append(out, k)
		case err == nil:
			t.Errorf("%s opens with another volume key", k)
		case !errors.Is(err, ErrKey):
			t.Errorf("%s: %v", k, err)
		}
	}
	return out
}

func TestLife(t *testing.T) {
	dev := newMemory()
	if _, _, err := Read(dev); !errors.Is(err, ErrNone) {
		t.Errorf("an empty device: %v", err)
	}
	h, vk := volume(t, dev, "a", "b")
	if got := opens(t, dev, vk, "a", "b", "c"); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("opened by %v", got)
	}
	again, health, err := Read(dev)
	if err != nil || !health.OK() || !reflect.DeepEqual(again, h) {
		t.Errorf("read %+v\nwrote %+v\n%v %v", again, h, health, err)
	}
	// Rotate b in one step, then remove a.
	_, slot, err := h.Open(dev, key("b"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Update(dev, vk, Change{Add: key("c"), KDF: quick, Remove: []int{slot}}); err != nil {
		t.Fatal(err)
	}
	if got := opens(t, dev, vk, "a", "b", "c"); !slices.Equal(got, []string{"a", "c"}) || len(h.Tokens) != 1 {
		t.Errorf("after rotation opened by %v, tokens %v", got, h.Tokens)
	}
	_, slot, _ = h.Open(dev, key("a"))
	old := h.Keyslots[slot]
	if _, err := h.Update(dev, vk, Change{Remove: []int{slot}}); err != nil {
		t.Fatal(err)
	}
	if got, _ := old.open(dev, key("a")); h.Is(got) {
		t.Error("a removed slot still opens")
	}
	last := slices.Collect(maps.Keys(h.Keyslots))
	if _, err := h.Update(dev, vk, Change{Remove: last}); !errors.Is(err, ErrLast) {
		t.Errorf("removing the last: %v", err)
	}
	if _, err := h.Update(dev, secret.New(KeySize), Change{Add: key("x"), KDF: quick}); err == nil {
		t.Error("a slot for another volume key")
	}
	if got := opens(t, dev, vk, "a", "b", "c"); !slices.Equal(got, []string{"c"}) {
		t.Errorf("in the end opened by %v", got)
	}
}

// All slots can be used, and a removed one's place again.
func TestFull(t *testing.T) {
	dev := newMemory()
	h, vk := volume(t, dev)
	for range MaxKeyslots {
		if _, err := h.Update(dev, vk, Change{Add: key("k"), KDF: quick}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Update(dev, vk, Change{Add: key("k"), KDF: quick}); err == nil {
		t.Error("one too many")
	}
	if _, err := h.Update(dev, vk, Change{Remove: []int{7}}); err != nil {
		t.Fatal(err)
	}
	if n, err := h.Update(dev, vk, Change{Add: key("new"), KDF: quick}); err != nil || n != 7 {
		t.Errorf("slot %d, %v", n, err)
	}
}

// TestPowerCut cuts the power at every flush of a rotation and of a removal, with random subsets of the sectors that were
// being written: what is left opens with all the old keys or with all the new ones.
func TestPowerCut(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, what := range []struct {
		name     string
		change   func(*Header) Change
		old, new []string
	}{
		{"add", func(*Header) Change { return Change{Add: key("c"), KDF: quick} }, []string{"a", "b"}, []string{"a", "b", "c"}},
		{"rotate", func(*Header) Change { return Change{Add: key("c"), KDF: quick, Remove: []int{1}} }, []string{"a", "b"}, []string{"a", "c"}},
		{"remove", func(*Header) Change { return Change{Remove: []int{1}} }, []string{"a", "b"}, []string{"a"}},
	} {
		dev := newMemory()
		h, vk := volume(t, dev, "a", "b")
		before := bytes.Clone(dev.b)
		dev.rounds = nil
		if _, err := h.Update(dev, vk, what.change(h)); err != nil {
			t.Fatal(err)
		}
		states := 0
		for cut := range len(dev.rounds) + 1 {
			for range 5 {
				disk := &memory{b: bytes.Clone(before)}
				for i, round := range dev.rounds {
					for _, w := range round {
						for off := 0; off < len(w.data); off += sectorSize {
							if i < cut || i == cut && random.IntN(2) == 0 {
								copy(disk.b[w.at+int64(off):], w.data[off:off+sectorSize])
							}
						}
					}
				}
				states++
				got := opens(t, disk, vk, "a", "b", "c")
				if !slices.Equal(got, what.old) && !slices.Equal(got, what.new) {
					t.Fatalf("%s, cut in flush %d: opened by %v", what.name, cut, got)
				}
				found, health, err := Read(disk)
				if err != nil {
					t.Fatal(err)
				}
				if !health.OK() {
					if err := found.Repair(disk); err != nil {
						t.Fatal(err)
					}
					if _, health, err := Read(disk); err != nil || !health.OK() {
						t.Fatalf("after the repair: %v, %v", health, err)
					}
				}
				if again := opens(t, disk, vk, "a", "b", "c"); !slices.Equal(again, got) {
					t.Fatalf("%s: the repair changed %v to %v", what.name, got, again)
				}
			}
		}
		t.Logf("%s: %d states", what.name, states)
	}
}

// A copy that is damaged, old, or another volume's gives way to the other.
func TestCopies(t *testing.T) {
	for name, c := range map[string]struct {
		spoil    func(b []byte)
		ok       bool
		primary  bool // whether it is the first that needs repair
		sequence uint64
	}{
		"first damaged":   {func(b []byte) { b[5000]++ }, true, true, 2},
		"first gone":      {func(b []byte) { clear(b[:4096]) }, true, true, 2},
		"second damaged":  {func(b []byte) { b[headerSize+5000]++ }, true, false, 2},
		"second gone":     {func(b []byte) { clear(b[headerSize : headerSize+4096]) }, true, false, 2},
		"both damaged":    {func(b []byte) { b[5000]++; b[headerSize+5000]++ }, false, false, 0},
		"first says size": {func(b []byte) { be.PutUint64(b[atSize:], 1<<63) }, true, true, 2},
	} {
		dev := newMemory()
		h, vk := volume(t, dev, "a")
		c.spoil(dev.b)
		got, health, err := Read(dev)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !c.ok {
			continue
		}
		if got.Sequence != c.sequence || (health.Primary != nil) != c.primary || (health.Secondary != nil) == c.primary || !reflect.DeepEqual(got, h) {
			t.Errorf("%s: %v, sequence %d", name, health, got.Sequence)
		}
		if err := got.Repair(dev); err != nil {
			t.Fatal(err)
		}
		if _, health, err := Read(dev); err != nil || !health.OK() || len(opens(t, dev, vk, "a")) != 1 {
			t.Errorf("%s: not repaired: %v, %v", name, health, err)
		}
	}
}

// What a header on a disk may not ask for.
func TestRefuses(t *testing.T) {
	dev := newMemory()
	h, _ := volume(t, dev, "a", "b")
	good, err := h.document()
	if err != nil {
		t.Fatal(err)
	}
	if err := (&Header{Size: h.Size}).parse(good); err != nil {
		t.Fatal(err)
	}
	for name, swap := range map[string][2]string{
		"a null cipher":          {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"cipher_null-ecb","sector_size"`},
		"a linear segment":       {`"type":"crypt"`, `"type":"linear"`},
		"a null keyslot":         {`"encryption":"aes-xts-plain64","key_size"`, `"encryption":"cipher_null-ecb","key_size"`},
		"endless iterations":     {`"iterations":10`, `"iterations":4294967295`},
		"negative iterations":    {`"iterations":10`, `"iterations":-1`},
		"an unknown KDF":         {`"type":"pbkdf2","salt"`, `"type":"scrypt","salt"`},
		"re-encryption":          {`"keyslots_size"`, `"requirements":{"mandatory":["online-reencrypt-v2"]},"keyslots_size"`},
		"an area in the header":  {`"offset":"65536"`, `"offset":"0"`},
		"an area over the other": {`"offset":"65536"`, `"offset":"323584"`},
		"an area far away":       {`"offset":"65536"`, `"offset":"9223372036854771712"`},
		"data in the header":     {`"offset":"16777216"`, `"offset":"65536"`},
		"odd sectors":            {`"sector_size":4096`, `"sector_size":4095`},
		"no digest":              {`"0":{"type":"pbkdf2","keyslots"`, `"1":{"type":"pbkdf2","keyslots"`},
		"a slot without digest":  {`"keyslots":["0","1"]`, `"keyslots":["0"]`},
		"a token for nothing":    {`"tokens":{`, `"tokens":{"9":{"type":"x","keyslots":["30"]},`},
		"a slot called 00":       {`"keyslots":{"0":`, `"keyslots":{"00":`},
		"another JSON size":      {`"json_size":"28672"`, `"json_size":"28671"`},
		"an unknown field":       {`"config":{`, `"config":{"x":1,`},
		"something behind":       {`"keyslots_size":"16711680"}}`, `"keyslots_size":"16711680"}}{}`},
	} {
		bad := strings.Replace(string(good), swap[0], swap[1], 1)
		if bad == string(good) {
			t.Fatalf("%s: %s is not in %s", name, swap[0], good)
		}
		if err := (&Header{Size: h.Size}).parse([]byte(bad)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for _, k := range []KDF{{Type: "argon2id", Time: 4, Memory: 1 << 30, CPUs: 1}, {Type: "argon2id", Time: 1 << 20, Memory: 1 << 10, CPUs: 1}, {Type: "argon2id", Memory: 1 << 10, CPUs: 1}, {Type: "argon2id", Time: 1, Memory: 1 << 10}} {
		k.Salt = make([]byte, 32)
		if err := k.check(); err == nil {
			t.Errorf("%+v: accepted", k)
		}
	}
}

// written is a header as Format and Update leave it, made without them: a fuzzer's seed must not cost anything.
func written() *Header {
	h := &Header{
		UUID: "01234567-89ab-4def-8123-456789abcdef", Label: "test", Size: headerSize, area: DataOffset - 2*headerSize,
		Keyslots: map[int]Keyslot{}, Tokens: map[int]Token{0: {Type: "bulkhead-test", Keyslots: []int{1}}},
		Segment: Segment{Offset: DataOffset, SectorSize: 4096}, digest: digest{"sha256", 1000, make([]byte, 32), make([]byte, 32)},
	}
	for n := range 2 {
		k := Keyslot{KeySize: KeySize, Offset: 2*headerSize + int64(n)*areaSize(KeySize), Size: areaSize(KeySize), Hash: "sha256", KDF: quick}
		k.KDF.Salt = make([]byte, 32)
		h.Keyslots[n] = k
	}
	return h
}

// FuzzDecode: whatever stands on a disk, reading it does not panic; what is accepted has areas in their place and can be written and
// read again.
func FuzzDecode(f *testing.F) {
	seed := written()
	document, err := seed.document()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(document)
	f.Add([]byte(`{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{"json_size":"28672","keyslots_size":"0"}}`))
	testfuzz.Run(f, func(t *testing.T, document []byte) {
		h := &Header{UUID: seed.UUID, Size: headerSize}
		if err := h.parse(document); err != nil {
			return
		}
		for n, k := range h.Keyslots {
			if k.Offset < 2*h.Size || k.Offset+k.Size > h.Segment.Offset || k.KDF.check() != nil {
				t.Errorf("keyslot %d: %+v", n, k)
			}
		}
		b, err := h.encode(magicPrimary, 0)
		if err != nil {
			return // too long: foreign tokens
		}
		again, err := decode(b, magicPrimary, 0)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := again.encode(magicPrimary, 0); err != nil || !bytes.Equal(twice[binarySize:], b[binarySize:]) {
			t.Errorf("written again it is another: %v\n%s\n%s", err, b[binarySize:], twice[binarySize:])
		}
	})
}

// FuzzRead looks for headers on any disk: two copies with what may stand in their binary parts, at their places, with right checksums
// or not.
func FuzzRead(f *testing.F) {
	h := written()
	h.Size, h.area = 16<<10, DataOffset-32<<10
	first, err := h.encode(magicPrimary, 0)
	second, err2 := h.encode(magicSecondary, h.Size)
	if err := errors.Join(err, err2); err != nil {
		f.Fatal(err)
	}
	document, _ := h.document()
	f.Add(first[:264], second[:264], document, true)
	f.Add([]byte{}, second[:264], document, true)
	testfuzz.Run(f, func(t *testing.T, first, second, document []byte, sum bool) {
		disk := &memory{b: make([]byte, 64<<10)}
		for i, head := range [][]byte{first, second} {
			b := disk.b[i*16<<10 : (i+1)*16<<10]
			copy(b[:atChecksum], head)
			copy(b[binarySize:], document)
			if s := checksum(b); sum {
				copy(b[atChecksum:], s[:])
			}
		}
		h, health, err := Read(disk)
		if err == nil && (h == nil || health.Primary != nil && health.Secondary != nil) {
			t.Errorf("no error, and %+v, %v", h, health)
		}
		if err == nil && !sum {
			t.Error("a wrong checksum was accepted")
		}
	})
}
