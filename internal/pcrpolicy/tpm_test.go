package pcrpolicy

import (
	"bytes"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/testtpm"
)

// define makes the index as storaged does, and writes to it once.
func define(t *testing.T, m *testtpm.TPM) {
	t.Helper()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(Index), NameAlg: tpm2.TPMAlgSHA256, DataSize: IndexSize,
		Attributes: tpm2.TPMANV{AuthWrite: true, NT: tpm2.TPMNTBits, AuthRead: true, NoDA: true},
	})}).Execute(m); err != nil {
		t.Fatal(err)
	}
	// TPM2_NV_SetBits of no bit, which go-tpm does not have: handle of the authorisation, index, an empty password (TPM_RS_PW).
	command, _ := hex.DecodeString("8002" + "00000027" + "00000135" + "01800b1d" + "01800b1d" + "00000009" + "40000009" + "0000" + "00" + "0000" + "0000000000000000")
	answer, err := m.Send(command)
	if err != nil || len(answer) < 10 || be.Uint32(answer[6:]) != 0 {
		t.Fatalf("TPM2_NV_SetBits: %x, %v", answer, err)
	}
}

// A TPM computes the same public area, Name, and policies.
func TestAgainstTPM(t *testing.T) {
	m := testtpm.Start(t)
	define(t, m)
	got, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(Index)}.Execute(m)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.NVPublic.Bytes(), IndexPublic()) || !bytes.Equal(got.NVName.Buffer, IndexName()) {
		t.Errorf("the TPM has public %x name %x; computed %x and %x", got.NVPublic.Bytes(), got.NVName.Buffer, IndexPublic(), IndexName())
	}

	// What the stub does, by tpm2-tools.
	sections := []Section{{".linux", []byte("kernel")}, {".cmdline", []byte("bulkhead\x00")}, {".osrel", []byte("ID=bulkhead\n")}, {".pcrsig", []byte("{}")}}
	for _, b := range []string{".linux\x00", "kernel", ".osrel\x00", "ID=bulkhead\n", ".cmdline\x00", "bulkhead\x00"} {
		d := hash([]byte(b))
		m.Tool("tpm2_pcrextend", "11:sha256="+hex.EncodeToString(d[:]))
	}
	pcr11, err := PredictPCR11(sections)
	if err != nil {
		t.Fatal(err)
	}
	if out := m.Tool("tpm2_pcrread", "sha256:11"); !strings.Contains(strings.ToLower(out), hex.EncodeToString(pcr11[:])) {
		t.Errorf("PCR 11 is %s; predicted %x", out, pcr11)
	}

	// The signed policy, by tpm2-tools in a trial session.
	p := Policy{pcr11, 5}
	want, err := p.Digest()
	if err != nil {
		t.Fatal(err)
	}
	bits, _ := EpochBits(5)
	m.File("bits", be.AppendUint64(nil, bits))
	m.Tool("tpm2_startauthsession", "-S", "s.ctx")
	m.Tool("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:11")
	m.Tool("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:12")
	m.Tool("tpm2_policynv", "-S", "s.ctx", "-C", fmt.Sprintf("%#x", Index), "-i", "bits", "-L", "policy", fmt.Sprintf("%#x", Index), "ule")
	m.Tool("tpm2_flushcontext", "s.ctx")
	if got := m.File("policy", nil); !bytes.Equal(got, want[:]) {
		t.Errorf("tpm2-tools get the policy %x; computed %x", got, want)
	}

	// The whole policy: the TPM loads the key under the computed Name, accepts the signature, and gets the same digest.
	signer := testKey(t)
	data, err := Sign(signer, p)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseSignature(data)
	if err != nil {
		t.Fatal(err)
	}
	key := signer.Public().(*rsa.PublicKey)
	pem, err := EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	m.File("key.pem", pem)
	m.File("sig", s.Signature)
	m.File("policy", s.Policy[:])
	m.Tool("tpm2_loadexternal", "-C", "o", "-G", "rsa2048:rsassa:null", "-g", "sha256", "-a", "sign|userwithauth", "-u", "key.pem", "-c", "key.ctx")
	m.Tool("tpm2_verifysignature", "-c", "key.ctx", "-g", "sha256", "-m", "policy", "-s", "sig", "-t", "ticket", "-f", "rsassa")
	m.Tool("tpm2_flushcontext", "-t")
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](KeyPublic(key))
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHOwner}.Execute(m)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(m)
	if !bytes.Equal(loaded.Name.Buffer, KeyName(key)) {
		t.Errorf("the key's Name is %x; computed %x", loaded.Name.Buffer, KeyName(key))
	}
	checkSeal(t, m, key, s, bits)
}

// checkSeal goes through the whole policy in a real session.
func checkSeal(t *testing.T, m *testtpm.TPM, key *rsa.PublicKey, s Signature, bits uint64) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pcrs := func(n uint) tpm2.TPMLPCRSelection {
		return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(n)}}}
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](KeyPublic(key))
	must(err)
	session, end, err := tpm2.PolicySession(m, tpm2.TPMAlgSHA256, 16)
	must(err)
	defer end()
	_, err = tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcrs(PCRImage)}.Execute(m)
	must(err)
	_, err = tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcrs(PCRAdded)}.Execute(m)
	must(err)
	index := tpm2.TPM2BName{Buffer: IndexName()}
	_, err = tpm2.PolicyNV{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(Index), Name: index, Auth: tpm2.PasswordAuth(nil)}, NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(Index), Name: index},
		PolicySession: session.Handle(), OperandB: tpm2.TPM2BOperand{Buffer: be.AppendUint64(nil, bits)}, Operation: CompareLE,
	}.Execute(m)
	must(err)
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHOwner}.Execute(m)
	must(err)
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(m)
	hashed := hash(s.Policy[:])
	ticket, err := tpm2.VerifySignature{KeyHandle: loaded.ObjectHandle, Digest: tpm2.TPM2BDigest{Buffer: hashed[:]}, Signature: tpm2.TPMTSignature{
		SigAlg:    tpm2.TPMAlgRSASSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: s.Signature}}),
	}}.Execute(m)
	must(err)
	_, err = tpm2.PolicyAuthorize{PolicySession: session.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: s.Policy[:]}, KeySign: loaded.Name, CheckTicket: ticket.Validation}.Execute(m)
	must(err)
	_, err = tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcrs(PCRSecureBoot)}.Execute(m)
	must(err)
	got, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(m)
	must(err)
	if want := Seal(key, Digest{}); !bytes.Equal(got.PolicyDigest.Buffer, want[:]) {
		t.Errorf("the TPM gets the policy %x; computed %x", got.PolicyDigest.Buffer, want)
	}
}
