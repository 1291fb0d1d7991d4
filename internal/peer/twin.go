//go:build twin

// This file is in images of evil twins only (test/twin): no other build has it.

package peer

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// ProbeKey is the metadata of a call that only wants to know whether the list lets it in.
const ProbeKey = "bulkhead-twin"

// LetIn is what such a call is told if the list does: its method is not run, for it might restart the machine.
const LetIn = "twin: the list lets it in"

// Heard, if it is set before anything is served, is told each call that succeeded.
var Heard func(method string, request, response any)

func probed() []grpc.ServerOption {
	probe := func(ctx context.Context) error {
		if md, _ := metadata.FromIncomingContext(ctx); len(md.Get(ProbeKey)) > 0 {
			return status.Error(codes.Aborted, LetIn)
		}
		return nil
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, si *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
			if err := probe(ctx); err != nil {
				return nil, err
			}
			if resp, err = h(ctx, req); err == nil && Heard != nil {
				Heard(si.FullMethod, req, resp)
			}
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := probe(ss.Context()); err != nil {
				return err
			}
			return h(srv, ss)
		}),
	}
}
