package trustd

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

const (
	// farPatience is how long one control plane may take until the next one is asked.
	farPatience = 8 * time.Second
	apidPort    = "50000"
)

// exchange is one call to another node's apid, through this node's, which has a network.
type exchange struct {
	stream   grpc.BidiStreamingClient[outboundv1.ExchangeRequest, outboundv1.ExchangeResponse]
	endpoint string
	binding  []byte // what ties a proof to the connection
}

// dial has apid connect to an endpoint. The call ends with ctx.
func (d *Daemon) dial(ctx context.Context, method, endpoint, roots, label string) (*exchange, error) {
	e := &exchange{endpoint: endpoint}
	var err error
	if e.stream, err = outboundv1.NewOutboundClient(d.apid).Exchange(ctx); err != nil {
		return nil, e.told(err)
	}
	open := &outboundv1.Open{Method: method, Endpoints: []string{endpoint}, Roots: roots, BindingLabel: label}
	if err := e.stream.Send(&outboundv1.ExchangeRequest{What: &outboundv1.ExchangeRequest_Open{Open: open}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, e.told(err) // of EOF Recv tells the reason
	}
	resp, err := e.stream.Recv()
	if err != nil {
		return nil, e.told(err)
	}
	if e.binding = resp.GetOpened().GetBinding(); len(e.binding) != join.BindingSize {
		return nil, errs.New(errs.Internal, "%s: apid gave %d bytes to tie the call to its connection, not %d", endpoint, len(e.binding), join.BindingSize)
	}
	return e, nil
}

func (e *exchange) send(m proto.Message) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	err = e.stream.Send(&outboundv1.ExchangeRequest{What: &outboundv1.ExchangeRequest_Message{Message: data}})
	if err != nil && !errors.Is(err, io.EOF) {
		return e.told(err)
	}
	return nil
}

// recv reads one answer. io.EOF if there is none any more.
func (e *exchange) recv(m proto.Message) error {
	resp, err := e.stream.Recv()
	if errors.Is(err, io.EOF) {
		return err
	} else if err != nil {
		return e.told(err)
	}
	if err := proto.Unmarshal(resp.GetMessage(), m); err != nil {
		return errs.New(errs.Internal, "%s: its answer makes no sense: %w", e.endpoint, err)
	}
	return nil
}

// told says who said it. That nobody answered in time is as that nobody is there.
func (e *exchange) told(err error) error {
	kind := errs.Of(err)
	if c := status.Code(err); c == codes.DeadlineExceeded || c == codes.Canceled || errors.Is(err, context.DeadlineExceeded) {
		return errs.New(errs.Unavailable, "%s: no answer in time", e.endpoint)
	}
	return errs.New(kind, "%s: %s", e.endpoint, errs.Text(err))
}

// call makes a call with one answer.
func (d *Daemon) call(ctx context.Context, method, endpoint, roots, label string, build func(binding []byte) (proto.Message, error), answer proto.Message) error {
	return d.callFor(ctx, farPatience, method, endpoint, roots, label, build, answer)
}

// callFor is call with a patience of its own, for a request that takes long to build.
func (d *Daemon) callFor(ctx context.Context, patience time.Duration, method, endpoint, roots, label string, build func(binding []byte) (proto.Message, error), answer proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	e, err := d.dial(ctx, method, endpoint, roots, label)
	if err != nil {
		return err
	}
	m, err := build(e.binding)
	if err != nil {
		return err
	}
	if err := e.send(m); err != nil {
		return err
	}
	if err := e.recv(answer); errors.Is(err, io.EOF) {
		return errs.New(errs.Internal, "%s: it ended the call without an answer", endpoint)
	} else if err != nil {
		return err
	}
	return nil
}

// far asks one control plane after the other until one gives the cluster's word.
func (d *Daemon) far(ctx context.Context, k *keyring, f func(endpoint string) error) error {
	var said []string
	for _, e := range d.controlPlanes(k) {
		err := f(e)
		if err == nil {
			d.lastGood.Set(e)
			return nil
		}
		switch errs.Of(err) {
		case errs.Unauthenticated, errs.Denied, errs.Invalid:
			return err // the cluster's word
		}
		if last, _ := d.lastGood.Get(); last == e {
			d.lastGood.Set("")
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		said = append(said, errs.Text(err))
	}
	return errs.New(errs.Unavailable, "no control plane of the cluster answers: %s", strings.Join(said, "; "))
}

// controlPlanes are the endpoints of control planes: first the one that answered last.
func (d *Daemon) controlPlanes(k *keyring) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	last, _ := d.lastGood.Get()
	out := slices.Concat([]string{last}, k.node.endpoints)
	for _, n := range d.known.GetNodes() {
		for _, a := range n.GetAddresses() {
			if n.GetRole() == roster.ControlPlane {
				out = append(out, net.JoinHostPort(a, apidPort))
			}
		}
	}
	var once []string
	for _, e := range out {
		if e != "" && !slices.Contains(once, e) {
			once = append(once, e)
		}
	}
	return once
}

// prove signs for a call of a node.
func (d *Daemon) prove(n *member, binding, payload []byte) (*trustv1.NodeProof, error) {
	sig, err := join.Sign(n.key, d.cfg.Random, binding, payload)
	return &trustv1.NodeProof{Name: n.name, Signature: sig, Instance: d.instance}, err
}

// signFar has a control plane sign for this worker.
func (d *Daemon) signFar(ctx context.Context, k *keyring, r *trustv1.SignCertificateRequest, key crypto.PublicKey) (*trustv1.SignCertificateResponse, error) {
	if !profiles[r.GetProfile()].worker {
		return nil, errs.New(errs.Precondition, "profile %q: node %q is a worker and does not get it; a worker gets %s", r.GetProfile(), k.node.name, strings.Join(forWorkers(), ", "))
	}
	roots, resp := d.osRoots(k), &trustv1.SignCertificateResponse{}
	err := d.far(ctx, k, func(endpoint string) error {
		return d.call(ctx, trustv1.Nodes_SignForNode_FullMethodName, endpoint, roots, join.NodeLabel, func(binding []byte) (proto.Message, error) {
			proof, err := d.prove(k.node, binding, join.SignPayload(d.instance, r.GetProfile(), r.GetCsr()))
			return &trustv1.SignForNodeRequest{Proof: proof, Profile: r.GetProfile(), Csr: r.GetCsr(), TtlSeconds: r.GetTtlSeconds()}, err
		}, resp)
	})
	if err != nil {
		return nil, err
	}
	cert, err := d.checkSigned(resp, key)
	if err != nil {
		return nil, errs.New(errs.Internal, "profile %q: the control plane's answer: %w", r.GetProfile(), err)
	}
	d.remember(r.GetProfile(), cert)
	return resp, nil
}

func (d *Daemon) osRoots(k *keyring) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.known.GetOsCa(); t != "" {
		return t
	}
	return k.osPEM()
}

// checkSigned checks that what a control plane signed is for this key, by an authority that is trusted here.
func (d *Daemon) checkSigned(resp *trustv1.SignCertificateResponse, key crypto.PublicKey) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(resp.GetCertificate()))
	ca, _ := pem.Decode([]byte(resp.GetCa()))
	if block == nil || ca == nil {
		return nil, errors.New("no PEM certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	by, err := x509.ParseCertificate(ca.Bytes)
	if err != nil {
		return nil, err
	}
	if err := cert.CheckSignatureFrom(by); err != nil {
		return nil, err
	}
	if pub, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key) {
		return nil, errors.New("it is for another key")
	}
	t, _ := d.trust.Get()
	if !strings.Contains(t.GetOsCa()+t.GetKubernetesCa(), resp.GetCa()) {
		return nil, errors.New("it is signed by an authority that is not the cluster's")
	}
	return cert, nil
}
