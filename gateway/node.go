package gateway

import (
	"context"
	"net/http"
	"net/url"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-os/bulkhead/internal/pattern"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

type nodeKey struct{}

// nodeOf is the metadata that tells apid which node is to answer a request; empty: this one.
func nodeOf(ctx context.Context) metadata.MD {
	if name, ok := ctx.Value(nodeKey{}).(string); ok {
		return metadata.Pairs(peer.NodeKey, name)
	}
	return metadata.MD{}
}

const nodePrefix = "/v1/nodes/"

// nodeName is that of RFC 1123; whether there is such a node is apid's to say.
var nodeName = pattern.Lazy(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// onNode takes the node's name off a request: /v1/nodes/NAME/version and /v1/version?node=NAME are both /v1/version on that node.
func onNode(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u := *r.URL
		var names []string
		if rest, ok := strings.CutPrefix(u.Path, nodePrefix); ok {
			if name, path, found := strings.Cut(rest, "/"); found {
				names = append(names, name)
				u.Path = "/v1/" + path
				if raw, ok := strings.CutPrefix(u.RawPath, nodePrefix); ok { // only if something in the path is escaped
					_, raw, _ = strings.Cut(raw, "/")
					u.RawPath = "/v1/" + raw
				}
			}
		}
		if q, err := url.ParseQuery(u.RawQuery); err == nil && q.Has("node") {
			names = append(names, q["node"]...)
			q.Del("node")
			u.RawQuery = q.Encode()
		}
		switch {
		case len(names) == 0:
			next.ServeHTTP(w, r)
			return
		case len(names) > 1:
			refuse(r.Context(), w, status.Errorf(codes.InvalidArgument, "%d nodes are named; a request is for one: either ?node=NAME or %sNAME/…", len(names), nodePrefix))
			return
		case !nodeName().MatchString(names[0]):
			refuse(r.Context(), w, status.Errorf(codes.InvalidArgument, "node: %.100q is no name of a node: those have lower-case letters, digits, \"-\" and \".\"", names[0]))
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), nodeKey{}, names[0])) // a copy
		r.URL = &u
		next.ServeHTTP(w, r)
	})
}
