package updated

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/pattern"
)

// Limits of what a registry says, in bytes.
const (
	maxRegistry = 1 << 20
	maxToken    = 16 << 10
)

// Media types of what a tag may lead to.
const (
	typeManifest       = "application/vnd.oci.image.manifest.v1+json"
	typeIndex          = "application/vnd.oci.image.index.v1+json"
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// A registry is an artifact in an OCI registry. It speaks as much of the distribution specification as it takes to pull: manifests, blobs
// by ranges, and tokens for them.
type registry struct {
	client             *http.Client
	ref                reference
	username, password string
	architecture       string
	authorization      string            // for the header; "" until the registry asks for it
	blobs              map[string]string // by the name of a bundle's file: digest
	ranges             bool
}

func newRegistry(text, ca, username, password, architecture string) (*registry, error) {
	ref, err := parseReference(text)
	if err != nil {
		return nil, err
	}
	c, err := newClient(ca)
	return &registry{client: c, ref: ref, username: username, password: password, architecture: architecture}, err
}

func (r *registry) String() string { return r.ref.String() }

// A descriptor is how one thing in a registry refers to another.
type descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations"`
	ArtifactType string            `json:"artifactType"`
	Platform     *struct {
		Architecture string `json:"architecture"`
	} `json:"platform"`
}

// titleKey is the annotation that names a layer's file.
const titleKey = "org.opencontainers.image.title"

func (r *registry) head(ctx context.Context) (manifest, signature []byte, err error) {
	layers, err := r.layers(ctx, r.ref.version(), true)
	if err != nil {
		return nil, nil, err
	}
	r.blobs = map[string]string{}
	for _, l := range layers {
		if name := l.Annotations[titleKey]; digestText().MatchString(l.Digest) {
			r.blobs[name] = l.Digest
		}
	}
	for _, name := range []string{bundle.ManifestName, bundle.KernelName, bundle.RootName, bundle.TreeName} {
		if r.blobs[name] == "" {
			return nil, nil, errs.New(errs.Invalid, "%s is no update: it has no layer %s", r.ref, name)
		}
	}
	if manifest, err = r.blob(ctx, bundle.ManifestName, bundle.MaxManifest); err != nil {
		return nil, nil, err
	}
	if r.blobs[bundle.SignatureName] != "" {
		signature, err = r.blob(ctx, bundle.SignatureName, bundle.SignatureSize)
	}
	return manifest, signature, err
}

// layers returns the layers of a manifest; an index is followed once, to the manifest of this architecture.
func (r *registry) layers(ctx context.Context, version string, follow bool) ([]descriptor, error) {
	resp, err := r.ask(ctx, "/manifests/"+version, func(q *http.Request) {
		q.Header.Set("Accept", strings.Join([]string{typeManifest, typeIndex, typeDockerManifest}, ", "))
	})
	if err != nil {
		return nil, err
	}
	b, err := readAll(resp, maxRegistry)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(version, "sha256:") && "sha256:"+bundle.Sum(b).String() != version {
		return nil, errs.New(errs.Invalid, "the registry sent another manifest than %s", version)
	}
	var m struct {
		MediaType string       `json:"mediaType"`
		Layers    []descriptor `json:"layers"`
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, errs.New(errs.Invalid, "%s: the registry's manifest: %w", r.ref, err)
	}
	if len(m.Manifests) == 0 || !follow {
		return m.Layers, nil
	}
	i := slices.IndexFunc(m.Manifests, func(d descriptor) bool { return d.Platform != nil && d.Platform.Architecture == r.architecture })
	if i < 0 && len(m.Manifests) == 1 && m.Manifests[0].Platform == nil {
		i = 0
	}
	if i < 0 || !digestText().MatchString(m.Manifests[i].Digest) {
		return nil, errs.New(errs.Precondition, "%s has nothing for the architecture %s", r.ref, r.architecture)
	}
	return r.layers(ctx, m.Manifests[i].Digest, false)
}

// blob reads a small layer whole.
func (r *registry) blob(ctx context.Context, name string, limit int64) ([]byte, error) {
	resp, err := r.ask(ctx, "/blobs/"+r.blobs[name], nil)
	if err != nil {
		return nil, err
	}
	b, err := readAll(resp, limit)
	if err == nil && "sha256:"+bundle.Sum(b).String() != r.blobs[name] {
		err = errs.New(errs.Invalid, "%s: the registry sent another layer than %s", name, r.blobs[name])
	}
	return b, err
}

func readAll(resp *http.Response, limit int64) ([]byte, error) {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%s: %w", resp.Request.URL.Redacted(), err)
	}
	if int64(len(b)) > limit {
		return nil, errs.New(errs.Invalid, "%s is longer than %d bytes", resp.Request.URL.Redacted(), limit)
	}
	return b, nil
}

func (r *registry) request(ctx context.Context, path string) (*http.Request, error) {
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, r.ref.base()+path, nil)
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	if r.authorization != "" {
		q.Header.Set("Authorization", r.authorization)
	}
	return q, nil
}

// ask makes a request and wants 200; if the registry wants to know who asks, it is told, once.
func (r *registry) ask(ctx context.Context, path string, edit func(*http.Request)) (*http.Response, error) {
	for try := 0; ; try++ {
		q, err := r.request(ctx, path)
		if err != nil {
			return nil, err
		}
		if edit != nil {
			edit(q)
		}
		resp, err := do(r.client, q)
		if err != nil {
			return nil, err
		}
		switch {
		case resp.StatusCode == http.StatusOK:
			r.ranges = r.ranges || resp.Header.Get("Accept-Ranges") == "bytes"
			return resp, nil
		case resp.StatusCode == http.StatusUnauthorized && try == 0:
			if err := r.login(ctx, resp); err != nil {
				return nil, err
			}
		default:
			return nil, refused(resp)
		}
	}
}

// login answers a registry's challenge (RFC 6750 and 7617).
func (r *registry) login(ctx context.Context, resp *http.Response) error {
	challenge := resp.Header.Get("WWW-Authenticate")
	refusal := refused(resp)
	scheme, rest, _ := strings.Cut(challenge, " ")
	switch {
	case strings.EqualFold(scheme, "basic") && r.username != "":
		q := http.Request{Header: http.Header{}}
		q.SetBasicAuth(r.username, r.password)
		r.authorization = q.Header.Get("Authorization")
		return nil
	case !strings.EqualFold(scheme, "bearer"):
		return errs.New(errs.Precondition, "%s wants to know who asks: give --username and a password: %w", r.ref.host, refusal)
	}
	params := map[string]string{}
	for _, m := range challengeParam().FindAllStringSubmatch(rest, 16) {
		params[strings.ToLower(m[1])] = m[2]
	}
	u, err := url.Parse(params["realm"])
	if err != nil || u.Host == "" {
		return errs.New(errs.Precondition, "%s names no server for tokens", r.ref.host)
	}
	if err := checkURL(u); err != nil {
		return err
	}
	query := u.Query()
	query.Set("service", params["service"])
	query.Set("scope", or(params["scope"], "repository:"+r.ref.name+":pull"))
	u.RawQuery = query.Encode()
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return errs.New(errs.Precondition, "%w", err)
	}
	if r.username != "" {
		q.SetBasicAuth(r.username, r.password)
	}
	answer, err := do(r.client, q)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return refused(answer)
	}
	b, err := readAll(answer, maxToken)
	if err != nil {
		return err
	}
	var t struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(b, &t); err != nil || t.Token == "" && t.AccessToken == "" {
		return errs.New(errs.Precondition, "%s gave no token: %w", u.Host, errors.Join(err, refusal))
	}
	r.authorization = "Bearer " + or(t.Token, t.AccessToken)
	return nil
}

// challengeParam is one parameter of a challenge: realm="…".
var challengeParam = pattern.Lazy(`([A-Za-z_]+)="([^"]*)"`)

// pieces tries a range on the smallest layer, because registries often do not say whether they know them.
func (r *registry) pieces(ctx context.Context) bool {
	if r.ranges {
		return true
	}
	q, err := r.request(ctx, "/blobs/"+r.blobs[bundle.ManifestName])
	if err != nil {
		return false
	}
	body, skip, err := get(r.client, q, 1, 1)
	if err != nil {
		return false
	}
	_ = body.Close() // only a look
	r.ranges = skip == 0
	return r.ranges
}

func (r *registry) open(ctx context.Context, h bundle.Head, file int, offset, length int64) (io.ReadCloser, int64, error) {
	path := "/blobs/" + r.blobs[h.Manifest.Files[file].Name]
	q, err := r.request(ctx, path)
	if err != nil {
		return nil, 0, err
	}
	body, skip, err := get(r.client, q, offset, length)
	if err == nil || !errs.Is(err, errs.Precondition) || r.authorization == "" {
		return body, skip, err
	}
	// The token may have expired: an upgrade can last longer.
	r.authorization = ""
	resp, err := r.ask(ctx, "/manifests/"+r.ref.version(), func(q *http.Request) { q.Header.Set("Accept", typeManifest+", "+typeIndex) })
	if err != nil {
		return nil, 0, err
	}
	_ = resp.Body.Close() // only the token counts
	if q, err = r.request(ctx, path); err != nil {
		return nil, 0, err
	}
	return get(r.client, q, offset, length)
}
