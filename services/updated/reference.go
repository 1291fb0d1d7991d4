package updated

import (
	"net"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/pattern"
)

// A reference names an artifact in a registry.
type reference struct {
	host   string // with port, if it has one
	name   string // repository
	tag    string // "latest" if neither tag nor digest is written
	digest string // "sha256:…", "" if none is written; it goes before the tag
}

// As in the OCI distribution specification, but a little longer names are refused.
var (
	repositoryName = pattern.Lazy(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagName        = pattern.Lazy(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	digestText     = pattern.Lazy(`^sha256:[0-9a-f]{64}$`)
	hostName       = pattern.Lazy(`^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$`)
)

// parseReference reads HOST[:PORT]/NAME[:TAG][@sha256:DIGEST], with or without "oci://" in front. There is no default registry.
func parseReference(s string) (reference, error) {
	text := strings.TrimPrefix(s, "oci://")
	host, rest, ok := strings.Cut(text, "/")
	rest, digest, hasDigest := strings.Cut(rest, "@")
	name, tag, hasTag := strings.Cut(rest, ":")
	if !hasTag && !hasDigest {
		tag = "latest"
	}
	r := reference{host: host, name: name, tag: tag, digest: digest}
	if !ok || len(s) > 512 || !hostName().MatchString(host) || !strings.ContainsAny(host, ".:") && host != "localhost" || !repositoryName().MatchString(name) ||
		(hasTag || tag != "") && !tagName().MatchString(tag) || hasDigest && !digestText().MatchString(digest) {
		return reference{}, errs.New(errs.Invalid, "%.200q is no reference like registry.example.org/bulkhead:1.2.3 (HOST[:PORT]/NAME[:TAG][@sha256:DIGEST])", s)
	}
	return r, nil
}

// version is what the registry is asked for.
func (r reference) version() string {
	if r.digest != "" {
		return r.digest
	}
	return r.tag
}

func (r reference) String() string {
	s := r.host + "/" + r.name
	if r.tag != "" {
		s += ":" + r.tag
	}
	if r.digest != "" {
		s += "@" + r.digest
	}
	return s
}

// base is where the registry's API is. Only a registry on this machine is spoken to in the clear.
func (r reference) base() string {
	host := r.host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	scheme := "https"
	if isLoopback(strings.Trim(host, "[]")) {
		scheme = "http"
	}
	return scheme + "://" + r.host + "/v2/" + r.name
}
