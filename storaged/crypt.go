package storaged

import (
	"slices"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// cap ends what the TPM does for the image. It comes before anything is mounted: what lies on a disk, whoever wrote it, finds nothing
// to open any more; and after STATE was opened, or it was tried.
func (p *planner) cap() {
	if p.have.TPM.TPM && !p.have.TPM.Capped && !p.capped {
		p.capped = true
		p.add(Step{Op: opCap})
	}
}

// stateKeys returns the keys that a STATE that is to be made gets; none: it is not encrypted.
func (p *planner) stateKeys() ([]vault.Kind, error) {
	useless := p.have.TPM.Useless()
	wanted := slices.ContainsFunc(p.want.Keys, func(k config.StorageKey) bool { return k.Kind == config.KeyTPM })
	switch p.want.Encryption {
	case config.EncryptionNone:
		return nil, nil
	case config.EncryptionLUKS2:
		if wanted && useless != "" {
			return nil, errs.New(errs.Precondition, "Storage.keys wants the TPM, but %s; correct that, or name other keys", useless)
		}
		if useless == "" && (wanted || len(p.want.Keys) == 0) {
			return []vault.Kind{vault.Recovery, vault.TPM}, nil
		}
		return []vault.Kind{vault.Recovery}, nil
	}
	if useless != "" { // auto, also of documents that were not filled in
		return nil, nil
	}
	return []vault.Kind{vault.Recovery, vault.TPM}, nil
}

// format makes a volume, encrypted or not, and mounts it. A device over it is what an earlier try has left.
func (p *planner) format(v volume, q *Partition) bool {
	if p.cap(); v.name == VarVolume && !p.state {
		return false // it would have to be done again: VAR's key goes to STATE
	}
	var kinds []vault.Kind
	switch {
	case v.name == StateVolume:
		var err error
		if kinds, err = p.stateKeys(); err != nil {
			p.errors = append(p.errors, err)
			return false
		}
	case p.crypt: // VAR is as STATE is
		kinds = []vault.Kind{vault.Recovery, vault.State}
	}
	if q.Map.Device != "" {
		p.add(p.step(opClose, v, *q))
	}
	if v.name == StateVolume {
		p.crypt, p.sealed = len(kinds) > 0, slices.Contains(kinds, vault.TPM)
	}
	q.Attributes &^= unformatted
	q.Content, q.LUKS, q.Map = probe.Result{}, vault.Header{}, Map{}
	if len(kinds) > 0 {
		q.Content.Kind, q.LUKS.Offset = probe.LUKS, luks.DataOffset
		s := p.step(opLUKS, v, *q)
		s.Keys = kinds
		p.add(s)
	}
	p.add(p.step(opMkfs, v, *q))
	p.add(p.step(opMount, v, *q))
	return true
}

// unlocked opens a volume that is encrypted, and reports whether it is open, or may be. It refuses one that is not what it was made as.
func (p *planner) unlocked(v volume, q Partition) bool {
	defer p.cap()
	if v.name == StateVolume {
		p.crypt, p.sealed = q.encrypted(), q.encrypted() && q.LUKS.Has(vault.TPM)
	}
	if !q.encrypted() {
		return p.plain(v, q)
	}
	if p.want.Encryption == config.EncryptionNone && v.name == StateVolume {
		p.fail(errs.Precondition, "Storage.encryption is none, but STATE of %s is encrypted: volumes stay as they were made; set it to luks2 or auto", &p.disk)
	}
	if h := q.LUKS; h.Unusable != "" {
		p.fail(errs.Precondition, "%s on %s of %s: its encryption cannot be read: %s; it is never formatted again: repair it from a rescue system, or remove partition %d to start anew",
			v.name, node(p.disk.Device, q.Number), &p.disk, h.Unusable, q.Number)
		return false
	}
	if q.LUKS.Repair != "" && p.spec {
		p.add(p.step(opHeader, v, q))
	}
	switch {
	case q.Map.Device != "":
	case v.name == VarVolume && p.state && q.LUKS.Has(vault.State), v.name == StateVolume && p.have.opens(q.LUKS):
		p.add(p.step(opOpen, v, q))
	case v.name == VarVolume && !p.state:
		return false // the error is STATE's
	default:
		p.fail(errs.Precondition, "%s is locked (%s): unlock it with its recovery key or passphrase (bhctl unlock)", v.name, p.have.why(q))
		return false
	}
	return true
}

// why says why an encrypted volume is not open.
func (s State) why(q Partition) string {
	switch {
	case q.Why != "":
		return q.Why
	case q.LUKS.Has(vault.State):
		return "its key lies on STATE"
	case q.LUKS.Has(vault.TPM) && !s.TPM.TPM:
		return "tpm: the machine has none"
	case q.LUKS.Has(vault.TPM) && s.TPM.Capped:
		return "tpm: it was asked once in this boot, which is all that there is"
	}
	return "it has only keys that people have"
}

// opens reports whether there is something that may open STATE without a person.
func (s State) opens(h vault.Header) bool {
	return h.Has(vault.KeyFile) || h.Has(vault.Service) || h.Has(vault.TPM) && s.TPM.TPM && !s.TPM.Capped
}

// plain looks at a volume that is not encrypted and was formatted.
func (p *planner) plain(v volume, q Partition) bool {
	switch {
	case v.name == VarVolume && p.crypt:
		// Somebody has put it there. What lies on it is believed by all that runs: it must not be.
		p.fail(errs.Denied, "VAR on %s of %s is not encrypted, but STATE is: it is not the VAR that was made; remove partition %d to make a new one",
			node(p.disk.Device, q.Number), &p.disk, q.Number)
		return false
	case v.name == StateVolume && p.want.Encryption == config.EncryptionLUKS2:
		p.fail(errs.Precondition, "Storage.encryption is luks2, but STATE of %s is not encrypted: volumes stay as they were made; set it to none or auto, or start anew", &p.disk)
	}
	return true
}

// keys adds those that the spec wants and STATE does not have, and takes ownership of the TPM once its key is on STATE.
func (p *planner) keys(q Partition) {
	v := volumeNamed(StateVolume)
	if p.sealed && !p.have.TPM.Owned {
		p.add(p.step(opOwner, v, q))
	}
	if !p.crypt {
		return
	}
	fresh := q.Attributes&unformatted != 0
	for _, k := range p.want.Keys {
		w := vault.Wish{Kind: vault.Kind(k.Kind), Partition: k.Partition, Firmware: k.Firmware, Address: k.Address, Pin: k.Pin}
		switch {
		case k.Kind == config.KeyPassphrase: // a person has to bring it
			continue
		case !fresh && slices.ContainsFunc(q.LUKS.Keys, w.Is), fresh && k.Kind == config.KeyTPM && p.sealed:
			continue
		case k.Kind == config.KeyTPM && p.have.TPM.Useless() != "":
			p.fail(errs.Precondition, "Storage.keys wants the TPM, but %s", p.have.TPM.Useless())
			continue
		}
		s := p.step(opKey, v, q)
		s.Wish = w
		p.add(s)
	}
}
