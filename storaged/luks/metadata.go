package luks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
)

// The JSON part. Numbers of 64 bits are texts there, and so are the numbers of keyslots, tokens, segments and digests.
type (
	document struct {
		Keyslots map[string]keyslotJSON `json:"keyslots"`
		Tokens   map[string]Token       `json:"tokens"`
		Segments map[string]segmentJSON `json:"segments"`
		Digests  map[string]digestJSON  `json:"digests"`
		Config   configJSON             `json:"config"`
	}
	keyslotJSON struct {
		Type     string   `json:"type"`
		KeySize  int      `json:"key_size"`
		Priority *int     `json:"priority,omitempty"`
		AF       afJSON   `json:"af"`
		Area     areaJSON `json:"area"`
		KDF      kdfJSON  `json:"kdf"`
	}
	afJSON struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	}
	areaJSON struct {
		Type       string `json:"type"`
		Offset     int64  `json:"offset,string"`
		Size       int64  `json:"size,string"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	}
	kdfJSON struct {
		Type       string `json:"type"`
		Salt       []byte `json:"salt"`
		Hash       string `json:"hash,omitempty"`
		Iterations int    `json:"iterations,omitempty"`
		Time       int    `json:"time,omitempty"`
		Memory     int    `json:"memory,omitempty"`
		CPUs       int    `json:"cpus,omitempty"`
	}
	segmentJSON struct {
		Type       string `json:"type"`
		Offset     int64  `json:"offset,string"`
		Size       string `json:"size"`
		IVTweak    uint64 `json:"iv_tweak,string"`
		Encryption string `json:"encryption"`
		SectorSize int    `json:"sector_size"`
	}
	digestJSON struct {
		Type       string   `json:"type"`
		Keyslots   []string `json:"keyslots"`
		Segments   []string `json:"segments"`
		Hash       string   `json:"hash"`
		Iterations int      `json:"iterations"`
		Salt       []byte   `json:"salt"`
		Digest     []byte   `json:"digest"`
	}
	configJSON struct {
		JSONSize     int64           `json:"json_size,string"`
		KeyslotsSize int64           `json:"keyslots_size,string"`
		Flags        []string        `json:"flags,omitempty"`
		Requirements json.RawMessage `json:"requirements,omitempty"`
	}
)

// digest is by what a volume key is recognised.
type digest struct {
	hash       string
	iterations int
	salt       []byte
	sum        []byte
}

// Token says what opens keyslots. Fields are those of its type; a token of a type that is not ours is kept as it is.
type Token struct {
	Type     string
	Keyslots []int
	Fields   map[string]json.RawMessage
}

// MarshalJSON writes the token as one object.
func (t Token) MarshalJSON() ([]byte, error) {
	all := maps.Clone(t.Fields)
	if all == nil {
		all = map[string]json.RawMessage{}
	}
	slots := []string{}
	for _, s := range t.Keyslots {
		slots = append(slots, strconv.Itoa(s))
	}
	var err, err2 error
	all["type"], err = json.Marshal(t.Type)
	all["keyslots"], err2 = json.Marshal(slots)
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// UnmarshalJSON reads a token of any type.
func (t *Token) UnmarshalJSON(b []byte) error {
	var head struct {
		Type     string   `json:"type"`
		Keyslots []string `json:"keyslots"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return err
	}
	*t = Token{Type: head.Type}
	for _, s := range head.Keyslots {
		n, err := slotNumber(s)
		if err != nil {
			return err
		}
		t.Keyslots = append(t.Keyslots, n)
	}
	if err := json.Unmarshal(b, &t.Fields); err != nil {
		return err
	}
	delete(t.Fields, "type")
	delete(t.Fields, "keyslots")
	return nil
}

// slotNumber reads "0" to "31", in no other form.
func slotNumber(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n >= MaxKeyslots || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("%q is no number of a keyslot or token", s)
	}
	return n, nil
}

// parse reads the JSON part and refuses what we would not make use of just as it says.
func (h *Header) parse(data []byte) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var doc document
	if err := d.Decode(&doc); err != nil {
		return fmt.Errorf("JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind the JSON")
	}
	c := doc.Config
	switch {
	case c.JSONSize != h.Size-binarySize:
		return fmt.Errorf("json_size is %d, the header has room for %d", c.JSONSize, h.Size-binarySize)
	case c.KeyslotsSize < 0 || c.KeyslotsSize > 1<<30 || c.KeyslotsSize%areaAlign != 0:
		return fmt.Errorf("keyslots_size, %d, is impossible", c.KeyslotsSize)
	case required(c.Requirements):
		return fmt.Errorf("the volume needs %s, which only cryptsetup can do", c.Requirements)
	case len(doc.Tokens) > maxTokens:
		return fmt.Errorf("%d tokens, more than %d", len(doc.Tokens), maxTokens)
	}
	h.area, h.flags = c.KeyslotsSize, c.Flags
	if err := errors.Join(h.parseSegment(doc), h.parseDigest(doc)); err != nil {
		return err
	}
	if err := h.parseKeyslots(doc); err != nil {
		return err
	}
	h.Tokens = map[int]Token{}
	for name, t := range doc.Tokens {
		n, err := slotNumber(name)
		if err != nil {
			return err
		}
		for _, s := range t.Keyslots {
			if _, ok := h.Keyslots[s]; !ok {
				return fmt.Errorf("token %d is for keyslot %d, which does not exist", n, s)
			}
		}
		h.Tokens[n] = t
	}
	return nil
}

// required reports whether there is anything in the requirements.
func required(raw json.RawMessage) bool {
	if len(raw) == 0 {
		return false
	}
	var r struct {
		Mandatory []string `json:"mandatory"`
	}
	return json.Unmarshal(raw, &r) != nil || len(r.Mandatory) > 0
}

func (h *Header) parseSegment(doc document) error {
	s, ok := doc.Segments["0"]
	if !ok || len(doc.Segments) != 1 {
		return fmt.Errorf("%d segments; one, called 0, can be used", len(doc.Segments))
	}
	if s.Type != "crypt" || s.Encryption != cipher {
		return fmt.Errorf("the data are %q with %q; only \"crypt\" with %q can be used", s.Type, s.Encryption, cipher)
	}
	if n := s.SectorSize; n < 512 || n > 4096 || n&(n-1) != 0 {
		return fmt.Errorf("sectors of %d bytes; 512, 1024, 2048 and 4096 can be used", n)
	}
	h.Segment = Segment{Offset: s.Offset, IVTweak: s.IVTweak, SectorSize: s.SectorSize}
	if s.Size != "dynamic" {
		n, err := strconv.ParseInt(s.Size, 10, 64)
		if err != nil || n <= 0 || n%int64(s.SectorSize) != 0 {
			return fmt.Errorf("a segment of size %q is impossible", s.Size)
		}
		h.Segment.Length = n
	}
	if s.Offset < 2*h.Size+h.area || s.Offset > 1<<40 || s.Offset%4096 != 0 {
		return fmt.Errorf("data at byte %d are impossible", s.Offset)
	}
	return nil
}

func (h *Header) parseDigest(doc document) error {
	d, ok := doc.Digests["0"]
	if !ok || len(doc.Digests) != 1 || !slices.Equal(d.Segments, []string{"0"}) {
		return errors.New("there must be one digest, called 0, for segment 0")
	}
	if d.Type != "pbkdf2" || hashes[d.Hash] == nil || d.Iterations < 1 || d.Iterations > maxIterations || len(d.Salt) < 8 || len(d.Salt) > 64 || len(d.Digest) < 20 || len(d.Digest) > 64 {
		return errors.New("the digest is of a kind that cannot be used")
	}
	h.digest = digest{d.Hash, d.Iterations, d.Salt, d.Digest}
	return nil
}

func (h *Header) parseKeyslots(doc document) error {
	h.Keyslots, h.priority = map[int]Keyslot{}, map[int]int{}
	bound := map[string]bool{}
	for _, s := range doc.Digests["0"].Keyslots {
		bound[s] = true
	}
	if len(bound) != len(doc.Keyslots) {
		return errors.New("the digest must be for all keyslots and no others")
	}
	for name, k := range doc.Keyslots {
		n, err := slotNumber(name)
		if err != nil {
			return err
		}
		if !bound[name] {
			return fmt.Errorf("keyslot %d has no digest", n)
		}
		slot := Keyslot{
			KeySize: k.KeySize, Offset: k.Area.Offset, Size: k.Area.Size, Hash: k.AF.Hash,
			KDF: KDF{k.KDF.Type, k.KDF.Salt, k.KDF.Hash, k.KDF.Iterations, k.KDF.Time, k.KDF.Memory, k.KDF.CPUs},
		}
		switch {
		case k.Type != "luks2" || k.Area.Type != "raw" || k.AF.Type != "luks1" || k.AF.Stripes != stripes || hashes[k.AF.Hash] == nil:
			err = errors.New("its kind cannot be used")
		case k.Area.Encryption != cipher || k.Area.KeySize != 32 && k.Area.KeySize != 64:
			err = fmt.Errorf("its area is encrypted with %q and %d bytes", k.Area.Encryption, k.Area.KeySize)
		case k.Area.KeySize != k.KeySize:
			err = errors.New("the keys of area and volume differ in size")
		case slot.KeySize != 32 && slot.KeySize != 64:
			err = fmt.Errorf("a volume key of %d bytes", slot.KeySize)
		case slot.Offset < 2*h.Size || slot.Offset%areaAlign != 0 || slot.Size < areaSize(slot.KeySize) || slot.Size > h.area || slot.Offset-2*h.Size > h.area-slot.Size:
			err = fmt.Errorf("its area, %d bytes at %d, is impossible", slot.Size, slot.Offset)
		default:
			err = slot.KDF.check()
		}
		if err != nil {
			return fmt.Errorf("keyslot %d: %w", n, err)
		}
		for m, o := range h.Keyslots {
			if slot.Offset < o.Offset+o.Size && o.Offset < slot.Offset+slot.Size {
				return fmt.Errorf("keyslots %d and %d overlap", m, n)
			}
			if slot.KeySize != o.KeySize {
				return fmt.Errorf("keyslots %d and %d hold keys of different sizes", m, n)
			}
		}
		h.Keyslots[n] = slot
		if k.Priority != nil {
			h.priority[n] = *k.Priority
		}
	}
	return nil
}

// check refuses what would take too long or too much memory, or protect too little.
func (k KDF) check() error {
	if len(k.Salt) < 8 || len(k.Salt) > 64 {
		return fmt.Errorf("a salt of %d bytes", len(k.Salt))
	}
	switch k.Type {
	case "pbkdf2":
		if hashes[k.Hash] == nil || k.Iterations < 1 || k.Iterations > maxIterations {
			return fmt.Errorf("pbkdf2 with %q and %d iterations; at most %d can be used", k.Hash, k.Iterations, maxIterations)
		}
	case "argon2id":
		if k.Time < 1 || k.Time > maxTime || k.Memory < 8*k.CPUs || k.Memory > maxMemory || k.CPUs < 1 || k.CPUs > maxCPUs {
			return fmt.Errorf("argon2id with %d rounds over %d KiB by %d processors; at most %d, %d and %d can be used", k.Time, k.Memory, k.CPUs, maxTime, maxMemory, maxCPUs)
		}
	default:
		return fmt.Errorf("the key derivation %q is not known", k.Type)
	}
	return nil
}

// document writes the JSON part. Equal headers give equal bytes.
func (h *Header) document() ([]byte, error) {
	doc := document{
		Keyslots: map[string]keyslotJSON{}, Tokens: map[string]Token{},
		Segments: map[string]segmentJSON{"0": {
			Type: "crypt", Offset: h.Segment.Offset, Size: "dynamic", IVTweak: h.Segment.IVTweak, Encryption: cipher, SectorSize: h.Segment.SectorSize,
		}},
		Config: configJSON{JSONSize: h.Size - binarySize, KeyslotsSize: h.area, Flags: h.flags},
	}
	if h.Segment.Length > 0 {
		s := doc.Segments["0"]
		s.Size = strconv.FormatInt(h.Segment.Length, 10)
		doc.Segments["0"] = s
	}
	bound := []string{}
	for _, n := range slices.Sorted(maps.Keys(h.Keyslots)) {
		k := h.Keyslots[n]
		out := keyslotJSON{
			Type: "luks2", KeySize: k.KeySize, AF: afJSON{"luks1", stripes, k.Hash}, Area: areaJSON{"raw", k.Offset, k.Size, cipher, k.KeySize},
			KDF: kdfJSON{k.KDF.Type, k.KDF.Salt, k.KDF.Hash, k.KDF.Iterations, k.KDF.Time, k.KDF.Memory, k.KDF.CPUs},
		}
		if p, ok := h.priority[n]; ok {
			out.Priority = &p
		}
		doc.Keyslots[strconv.Itoa(n)] = out
		bound = append(bound, strconv.Itoa(n))
	}
	for n, t := range h.Tokens {
		doc.Tokens[strconv.Itoa(n)] = t
	}
	doc.Digests = map[string]digestJSON{"0": {"pbkdf2", bound, []string{"0"}, h.digest.hash, h.digest.iterations, h.digest.salt, h.digest.sum}}
	return json.Marshal(doc)
}
