package wired

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// until waits for a line with all texts in a log.
func (c *console) until(ctx context.Context, t *testing.T, texts ...string) {
	t.Helper()
	for {
		text, changed := c.text.Get()
	lines:
		for line := range strings.SplitSeq(text, "\n") {
			for _, want := range texts {
				if !strings.Contains(line, want) {
					continue lines
				}
			}
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("no line with %q in\n%s", texts, text)
		case <-changed:
		}
	}
}

// A machine's disk is copied, and the copy is started in another one: the first machine gets nothing any more and is told why, which is a line in the audit log of the control plane that refused it, with
// its address, and an event there.
func TestCopiedDiskIsAudited(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	shared := &store{data: map[string]*storev1.Entry{}}
	n1, n2, twin := newNode(t), newNode(t), newNode(t)
	all := doors{"10.5.0.11": n1, "10.5.0.12": n2, "10.5.0.13": twin}
	var audit, events console
	n1.apidLog = slog.New(slog.NewTextHandler(&audit, nil))
	n1.trustdLog = slog.New(slog.NewTextHandler(&events, nil))
	for _, n := range []*node{n1, n2} {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.serveStore(shared)
		n.startTrustd()
		n.startDoor(all)
	}
	conn, _ := n1.found(ctx, "n1")
	made, err := trustv1.NewMembershipClient(conn).MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: "worker", Name: "n2"})
	n1.must(err)
	_, err = n2.join(ctx, "n2", made.GetToken(), n1.address)
	n2.must(err)
	n1.must(n2.sign(ctx)) // it is a member, and the cluster has met it

	twin.must(os.CopyFS(filepath.Join(twin.dir, "state"), os.DirFS(filepath.Join(n2.dir, "state"))))
	twin.serveStore(shared)
	twin.startTrustd()
	twin.startDoor(all)
	twin.must(twin.sign(ctx))

	err = n2.sign(ctx)
	if !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), `another machine runs with the key of node "n2" (last seen at 10.5.0.13, 10.5.0.12): a copied disk?`) {
		t.Errorf("the first machine asks for a certificate: %v", err)
	}
	audit.until(ctx, t, "msg=audit", trustv1.Nodes_SignForNode_FullMethodName, "code=PermissionDenied", "peer=10.5.0.12", "another machine runs with the key of node")
	events.until(ctx, t, "msg=event", "type=cluster", "another machine runs with the key of node", "10.5.0.13")
}

// sign asks the node's trustd for a certificate, as its apid does.
func (n *node) sign(ctx context.Context) error {
	conn, err := peer.Dial(filepath.Join(n.dir, "trustd"))
	n.must(err)
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	n.must(err)
	n.caller.Store(uint32(uid.Apid))
	_, err = trustv1.NewSignerClient(conn).SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "apid-server", Csr: request})
	return err
}
