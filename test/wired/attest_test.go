package wired

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// ownTPM is storaged's service for trustd, on a machine's TPM.
type ownTPM struct {
	storagev1.UnimplementedAttestationServer
	m *tpm.TPM
}

func (o ownTPM) Describe(context.Context, *storagev1.DescribeRequest) (*storagev1.DescribeResponse, error) {
	d, err := o.m.Describe()
	return &storagev1.DescribeResponse{EndorsementKey: d.EK, EndorsementCertificate: d.Certificate, AttestationKey: d.AK}, err
}

func (o ownTPM) Prove(_ context.Context, r *storagev1.ProveRequest) (*storagev1.ProveResponse, error) {
	secret, q, err := o.m.Prove(attest.Credential{Blob: r.GetCredential(), Secret: r.GetEncryptedSecret()}, r.GetQualifier())
	return &storagev1.ProveResponse{Secret: secret, Quote: q.Attest, Signature: q.Signature, Pcrs: [][]byte{q.Values[0][:], q.Values[1][:], q.Values[2][:]}}, err
}

// maker gives a TPM its certificate, and returns that of its own (PEM).
func maker(t *testing.T, m *testtpm.TPM) string {
	t.Helper()
	d, err := attest.Describe(m)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	must(err)
	ek, err := x509.ParsePKIXPublicKey(d.EK)
	must(err)
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), KeyUsage: x509.KeyUsageKeyAgreement}, ca, ek, key)
	must(err)
	m.File("cert", cert)
	m.Tool("tpm2_nvdefine", "0x01c0000a", "-C", "o", "-s", strconv.Itoa(len(cert)), "-a", "ownerread|ownerwrite|authread|no_da")
	m.Tool("tpm2_nvwrite", "0x01c0000a", "-C", "o", "-i", "cert")
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// A machine joins by its TPM through two real doors, by the certificate of its TPM's maker and its PCR 11, once; the administrator sees what it showed.
func TestJoinByTPMThroughDoors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	soft := testtpm.Start(t)
	authority := maker(t, soft)
	soft.Tool("tpm2_pcrextend", "11:sha256="+strings.Repeat("ab", 32))
	image := sha256.Sum256(append(make([]byte, 32), mustHex(t, strings.Repeat("ab", 32))...))
	shared := &store{data: map[string]*storev1.Entry{}}
	n1, n2, n3 := newNode(t), newNode(t), newNode(t)
	all := doors{"10.5.0.11": n1, "10.5.0.12": n2, "10.5.0.13": n3}
	for _, n := range []*node{n1, n2, n3} {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.serveStore(shared)
		if n != n1 {
			g := grpc.NewServer()
			storagev1.RegisterAttestationServer(g, ownTPM{m: tpm.New(soft)})
			l := n.bind("storaged")
			go func() { _ = g.Serve(l) }()
			t.Cleanup(g.Stop)
		}
		n.startTrustd()
		n.startDoor(all)
	}
	conn, creds := n1.found(ctx, "n1")
	block, _ := pem.Decode(creds.CA)
	digest := sha256.Sum256(block.Bytes)
	invitation := attest.Invitation(hex.EncodeToString(digest[:]))
	if _, err := n2.join(ctx, "n2", invitation, n1.address); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "bhctl attest allow --ek ") {
		t.Errorf("before it is allowed: %v", err)
	}
	members := trustv1.NewMembershipClient(conn)
	made, err := members.AllowAttestation(ctx, &trustv1.AllowAttestationRequest{Role: "worker", EndorsementAuthorities: authority, Pcr11: hex.EncodeToString(image[:])})
	n1.must(err)
	if _, err := n2.join(ctx, "n2", attest.Invitation(strings.Repeat("0", 64)), n1.address); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "it is of another cluster, or somebody is in between") {
		t.Errorf("told of another cluster: %v", err)
	}
	resp, err := n2.join(ctx, "n2", invitation, n1.address)
	n2.must(err)
	if resp.GetRole() != "worker" {
		t.Errorf("joined as %q", resp.GetRole())
	}
	list, err := members.ListAttestations(ctx, &trustv1.ListAttestationsRequest{})
	n1.must(err)
	if len(list.GetMembers()) != 1 || list.GetMembers()[0].GetAttested().GetPcr11() != hex.EncodeToString(image[:]) || list.GetAttestations()[0].GetUsedBy() != "n2" || list.GetAttestations()[0].GetId() != made.GetId() {
		t.Errorf("the list: %v", list)
	}
	if _, err := n3.join(ctx, "n3", invitation, n1.address); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "not allowed to join by its TPM") {
		t.Errorf("once more by the same attestation: %v", err)
	}
	if _, err := trustv1.NewTrustClient(conn).ListCertificates(client.OnNode(ctx, "n2"), &trustv1.ListCertificatesRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("the cluster does not reach the new node: %v", err)
	}
}

func mustHex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
