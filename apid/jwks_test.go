package apid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// The keys of RFC 7517 appendix A.1 and RFC 8037 appendix A.2, and one for encryption.
const someKeys = `{"keys": [
 {"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","use":"enc","kid":"1"},
 {"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB","alg":"RS256","kid":"2011-04-29"},
 {"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"ed"},
 {"kty":"oct","k":"AAAA","kid":"hmac"}]}`

func TestParseKeys(t *testing.T) {
	set, err := parseKeys([]byte(someKeys))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id, alg string
		ok      bool
	}{
		{"2011-04-29", "RS256", true}, {"2011-04-29", "PS256", false}, {"2011-04-29", "HS256", false}, {"ed", "EdDSA", true}, {"ed", "ES256", false},
		{"1", "ES256", false}, {"hmac", "HS256", false}, {"", "RS256", false}, {"nobody", "RS256", false},
	} {
		if got := set.find(c.id, c.alg) != nil; got != c.ok {
			t.Errorf("key %q for %s: %v", c.id, c.alg, got)
		}
	}
	for want, in := range map[string]string{
		"not JSON": "x", "there are none": `{"keys": []}`, "has 65 keys": `{"keys": [` + strings.Repeat("{},", 64) + `{}]}`,
		"not for signatures": `{"keys": [{"kty": "oct"}]}`, "RSA of 8 bits": `{"keys": [{"kty": "RSA", "n": "_w", "e": "AQAB"}]}`,
		"no good key has":    `{"keys": [{"kty": "RSA", "n": "` + strings.Repeat("_", 342) + `", "e": "Ag"}]}`,
		"32 bytes":           `{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}`,
		"not on curve":       `{"keys": [{"kty": "EC", "crv": "P-256", "x": "` + strings.Repeat("A", 43) + `", "y": "` + strings.Repeat("A", 43) + `"}]}`,
		"allowed are P-256":  `{"keys": [{"kty": "EC", "crv": "P-224"}]}`,
		"allowed is Ed25519": `{"keys": [{"kty": "OKP", "crv": "X25519", "x": "` + strings.Repeat("A", 43) + `"}]}`,
	} {
		if _, err := parseKeys([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, want %s", in, err, want)
		}
	}
}

// FuzzParseKeys: whatever an issuer sends, no panic, and no key that is good for HMAC or for nothing.
func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(someKeys))
	f.Add([]byte(`{"keys": [{"kty": "RSA", "n": "", "e": ""}, {"KTY": "EC", "crv": "P-521"}]}`))
	testfuzz.Run(f, func(t *testing.T, in []byte) {
		set, err := parseKeys(in)
		if err != nil {
			return
		}
		for _, k := range set.keys {
			if k.fits("HS256") || k.fits("none") || k.public == nil {
				t.Errorf("key %+v", k)
			}
		}
	})
}

// FuzzIDToken: whatever a stranger sends, no panic, and nobody is let in.
func FuzzIDToken(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	f.Add(b64([]byte(`{"alg":"ES256","kid":"k"}`)), b64([]byte(`{"iss":"https://a","aud":"b","sub":"c","exp":9999999999}`)), b64(make([]byte, 64)))
	f.Add(b64([]byte(`{"alg":["ES256"]}`)), b64([]byte(`{"iss":1,"exp":"x","alg":"ES256"}`)), "")
	o := config.OIDC{Issuer: "https://a", ClientID: "b", Audience: "b", UsernameClaim: "sub", GroupsClaim: "groups"}
	testfuzz.Run(f, func(t *testing.T, header, payload, signature string) {
		text := fmt.Sprint(header, ".", payload, ".", signature)
		s, ok := peek(text)
		if !ok || plausible(s, o) != nil {
			return
		}
		if who, err := fromIDToken(text, s, key.Public(), o, time.Now()); err == nil {
			t.Errorf("let in as %+v", who)
		}
	})
}
