package apid

import (
	"context"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// accessServer tells callers about themselves; guard has found out who they are.
type accessServer struct {
	accessv1.UnimplementedAccessServer
}

func (accessServer) GetIssuer(ctx context.Context, _ *accessv1.GetIssuerRequest) (*accessv1.GetIssuerResponse, error) {
	c := callFrom(ctx)
	if c == nil || c.grants == nil || c.grants.issuer == nil {
		return nil, errs.New(errs.NotFound, "this node's configuration names no issuer (Access.oidc): there is nowhere to sign in")
	}
	return &accessv1.GetIssuerResponse{Issuer: c.grants.issuer.config.Issuer, ClientId: c.grants.issuer.config.ClientID}, nil
}

func (accessServer) WhoAmI(ctx context.Context, _ *accessv1.WhoAmIRequest) (*accessv1.WhoAmIResponse, error) {
	c := callFrom(ctx)
	if c == nil {
		return nil, errStranger
	}
	methods := map[string]bool{}
	for _, m := range c.who.may {
		maps.Copy(methods, m.methods)
	}
	out := &accessv1.WhoAmIResponse{Name: c.who.name, Roles: c.who.roles, How: c.who.how, Id: c.who.id, Groups: c.who.groups, Expires: timestamppb.New(c.who.expires)}
	for _, m := range slices.Sorted(maps.Keys(methods)) {
		out.Methods = append(out.Methods, strings.TrimPrefix(m, "/"))
	}
	return out, nil
}
