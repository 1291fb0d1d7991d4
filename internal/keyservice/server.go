package keyservice

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Files of a server's folder.
const (
	masterFile = "master.key" // 32 bytes; whoever has it and the disks has the disks
	keyFile    = "server.key" // PKCS #8, DER
	certFile   = "server.der" // certificate, DER
	nodesFile  = "nodes"      // "sha256:… name", a line for each node that may seal and unseal
	masterSize = 32
	maxNodes   = 1 << 20 // bytes of that file
)

// Server is the reference server. Make it with Load; its methods are those of keys.v1.KeyService.
type Server struct {
	keysv1.UnimplementedKeyServiceServer
	folder string
	log    *slog.Logger
	master []byte
	cert   tls.Certificate
}

// Load reads the server's keys from a folder, mode 0700, and makes those that are missing.
func Load(folder string, log *slog.Logger) (*Server, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	s := &Server{folder: folder, log: log}
	var err error
	if s.master, err = s.file(masterFile, func() ([]byte, error) {
		b := make([]byte, masterSize)
		_, err := rand.Read(b)
		return b, err
	}); err != nil {
		return nil, err
	}
	if len(s.master) != masterSize {
		return nil, fmt.Errorf("%s: %d bytes, not %d", filepath.Join(folder, masterFile), len(s.master), masterSize)
	}
	der, err := s.file(keyFile, func() ([]byte, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		return x509.MarshalPKCS8PrivateKey(key)
	})
	if err != nil {
		return nil, err
	}
	any, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(folder, keyFile), err)
	}
	key, ok := any.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s: a %T", filepath.Join(folder, keyFile), any)
	}
	cert, err := s.file(certFile, func() ([]byte, error) { return selfSigned(key) })
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(folder, certFile), err)
	}
	s.cert = tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key, Leaf: leaf}
	return s, nil
}

// Pin is what nodes are told to know this server by.
func (s *Server) Pin() string { return Pin(s.cert.Leaf) }

// file reads a file of the folder; if there is none it makes one, durably.
func (s *Server) file(name string, make func() ([]byte, error)) ([]byte, error) {
	path := filepath.Join(s.folder, name)
	b, err := os.ReadFile(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	if b, err = make(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	return b, err
}

func selfSigned(key *ecdsa.PrivateKey) ([]byte, error) {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bulkhead key server"}, DNSNames: []string{"keyserver"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	return x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
}

// Serve answers on l until ctx is done; it returns ctx's error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{s.cert}, ClientAuth: tls.RequireAnyClientCert, // which one counts is decided with each call
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(4), grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: time.Minute}))
	keysv1.RegisterKeyServiceServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		g.Stop()
		<-done
		return ctx.Err()
	}
}

// node returns the caller's fingerprint, if it may call. The list is read each time: to take a node out, delete its line.
func (s *Server) node(ctx context.Context, what string) (string, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", errs.New(errs.Unauthenticated, "no certificate")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return "", errs.New(errs.Unauthenticated, "no certificate")
	}
	print := Fingerprint(info.State.PeerCertificates[0].Raw)
	name, err := s.lookup(print)
	if err != nil {
		s.log.Error("nodes cannot be read", "err", err.Error())
		return "", errs.New(errs.Internal, "the server cannot read its list of nodes")
	}
	if name == "" {
		s.log.Warn("refused", "what", what, "node", print, "from", p.Addr.String())
		return "", errs.New(errs.Denied, "this server does not know the node %s", print)
	}
	s.log.Info(what, "node", name, "from", p.Addr.String())
	return print, nil
}

// lookup returns a node's name, or its fingerprint if it has none; "" if it is not on the list.
func (s *Server) lookup(print string) (string, error) {
	f, err := os.Open(filepath.Join(s.folder, nodesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() > maxNodes {
		return "", errors.Join(err, fmt.Errorf("%s: %d bytes, at most %d are read", nodesFile, st.Size(), maxNodes))
	}
	b := make([]byte, st.Size())
	n, err := f.ReadAt(b, 0)
	if err != nil && int64(n) != st.Size() {
		return "", err
	}
	for line := range strings.Lines(string(b[:n])) {
		word, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		if word == print {
			if name = strings.TrimSpace(name); name == "" {
				name = print
			}
			return name, nil
		}
	}
	return "", nil
}

// box is the node's own cipher.
func (s *Server) box(node string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, s.master, nil, "bulkhead key service for "+node, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Seal encrypts for the calling node.
func (s *Server) Seal(ctx context.Context, r *keysv1.SealRequest) (*keysv1.SealResponse, error) {
	node, err := s.node(ctx, "seal")
	if err != nil {
		return nil, err
	}
	if n := len(r.GetPlaintext()); n < 1 || n > MaxPlaintext {
		return nil, errs.New(errs.Invalid, "plaintext: %d bytes; 1 to %d are allowed", n, MaxPlaintext)
	}
	box, err := s.box(node)
	if err != nil {
		return nil, err
	}
	return &keysv1.SealResponse{Sealed: box.Seal(nil, nil, r.GetPlaintext(), []byte(node))}, nil
}

// Unseal decrypts for the node that it was sealed for.
func (s *Server) Unseal(ctx context.Context, r *keysv1.UnsealRequest) (*keysv1.UnsealResponse, error) {
	node, err := s.node(ctx, "unseal")
	if err != nil {
		return nil, err
	}
	box, err := s.box(node)
	if err != nil {
		return nil, err
	}
	if n := len(r.GetSealed()); n > MaxSealed {
		return nil, errs.New(errs.Invalid, "sealed: %d bytes, at most %d", n, MaxSealed)
	}
	plain, err := box.Open(nil, nil, r.GetSealed(), []byte(node))
	if err != nil {
		return nil, errs.New(errs.Invalid, "sealed: it was not sealed for this node by this server")
	}
	return &keysv1.UnsealResponse{Plaintext: plain}, nil
}
