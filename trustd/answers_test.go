package trustd

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"

	"github.com/bulkhead-os/bulkhead/config"
)

// answers keeps every answer that a machine's trustd gives in a test, whatever the test is about: none may have a private or a secret key of the node or the cluster in it, in
// whatever form, for whoever asks.
type answers struct {
	mu  sync.Mutex
	all map[string]string // guarded by mu; the method by the answer
}

type methodKey struct{}

func (a *answers) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, methodKey{}, info.FullMethodName)
}

func (a *answers) HandleRPC(ctx context.Context, s stats.RPCStats) {
	in, ok := s.(*stats.InPayload)
	if !ok {
		return
	}
	text, err := proto.Marshal(in.Payload.(proto.Message))
	if err != nil {
		panic(err) // it was read from bytes a moment ago
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all[string(text)] = ctx.Value(methodKey{}).(string)
}

func (a *answers) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (a *answers) HandleConn(context.Context, stats.ConnStats)                       {}

// judge looks for the keys in dir in all answers.
func (a *answers) judge(t testing.TB, dir string) {
	t.Helper()
	secrets := secretsIn(t, dir)
	a.mu.Lock()
	defer a.mu.Unlock()
	for answer, method := range a.all {
		for _, s := range secrets {
			if s.in(answer) {
				t.Errorf("an answer of %s has %s in it", method, s.name)
			}
		}
	}
}

// secretKey is a key on STATE, and what one would see of it, in any of the forms that a program writes a key in.
type secretKey struct {
	name   string
	raw    string
	base64 []string
}

func (s secretKey) in(answer string) bool {
	if strings.Contains(answer, s.raw) {
		return true
	}
	line := strings.NewReplacer("\n", "", `\n`, "").Replace(answer)
	return slices.ContainsFunc(s.base64, func(form string) bool { return strings.Contains(line, form) })
}

// newSecret takes a PEM block's text, or the key's bytes.
func newSecret(t testing.TB, name, text string, raw []byte) secretKey {
	t.Helper()
	var written [][]byte
	if block, _ := pem.Decode([]byte(text)); block != nil {
		k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		switch k := k.(type) {
		case *ecdsa.PrivateKey:
			raw, err = k.Bytes()
		case ed25519.PrivateKey:
			raw = k.Seed()
		default:
			err = fmt.Errorf("%s is a %T, which this test cannot look for", name, k)
		}
		if err != nil {
			t.Fatal(err)
		}
		written = append(written, []byte(text))
	}
	s := secretKey{name: name, raw: string(raw)}
	for _, w := range append(written, raw) {
		for shift := range 3 { // wherever in a text it begins
			form := base64.RawStdEncoding.EncodeToString(append(make([]byte, shift), w...))
			s.base64 = append(s.base64, form[4:len(form)-4]) // without what depends on its neighbours
		}
	}
	return s
}

// secretsIn are the keys of all files of a folder: private keys, and what is called a key and is bytes, but for public ones.
func secretsIn(t testing.TB, dir string) (out []secretKey) {
	t.Helper()
	var walk func(name string, v any)
	walk = func(name string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				walk(name+"."+k, x)
			}
		case []any:
			for _, x := range v {
				walk(name, x)
			}
		case string:
			if strings.HasPrefix(v, "-----BEGIN PRIVATE KEY-----") {
				out = append(out, newSecret(t, name, v, nil))
				return
			}
			raw, err := base64.StdEncoding.DecodeString(v)
			if err != nil || len(raw) < 16 || !strings.HasSuffix(strings.ToLower(name), "key") || strings.HasSuffix(name, ".nodes.key") { // a fingerprint, for all
				return
			}
			if _, err := x509.ParsePKIXPublicKey(raw); err != nil { // else it is public
				out = append(out, newSecret(t, name, "", raw))
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if json.Unmarshal(data, &v) == nil { // some tests spoil files
			walk(filepath.Base(file), v)
		}
	}
	return out
}

// The judge finds a key that somebody gives away, however it is written.
func TestAnswersAreJudged(t *testing.T) {
	m := newMachine(t)
	m.mountState()
	d := m.start()
	m.claim(d)
	configure(t, d, 1, config.ControlPlane)
	secrets := secretsIn(t, m.cfg.StateDir)
	data, err := os.ReadFile(filepath.Join(m.cfg.StateDir, identityFile))
	m.must(err)
	var id identityOnDisk
	m.must(json.Unmarshal(data, &id))
	block, _ := pem.Decode([]byte(id.OS.Key))
	i := slices.IndexFunc(secrets, func(s secretKey) bool { return s.name == identityFile+".os.key" })
	if i < 0 || len(secrets) < 2 {
		t.Fatalf("%d keys found on STATE, the authority's at %d", len(secrets), i)
	}
	encode := base64.StdEncoding.EncodeToString
	for name, leak := range map[string]string{
		"PEM": id.OS.Key, "a document with PEM": strings.ReplaceAll(id.OS.Key, "\n", `\n`), "DER": string(block.Bytes), "base64 of DER": "k: " + encode(block.Bytes),
		"base64 of more": encode([]byte("xy" + string(block.Bytes))), "base64 of PEM": encode([]byte("x" + id.OS.Key)), "the number": "k" + secrets[i].raw,
	} {
		if !secrets[i].in(leak) {
			t.Errorf("%s: not found", name)
		}
	}
	if secrets[i].in(id.OS.Certificate) || secrets[i].in("") {
		t.Error("found in a certificate")
	}
}
