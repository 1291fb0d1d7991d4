package storaged

import (
	"context"
	"log/slog"
	"os"
	"runtime"
	"strings"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/version"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// releaseKeys is where the image has the keys whose bundles it takes.
const releaseKeys = "/usr/share/bulkhead/release.pub"

// callers are those besides apid and machined's Control: who may fill slots, who may end it all, and who may show others which machine this is.
var callers = peer.List{
	slotv1.Slots_ServiceDesc.ServiceName:          {uid.Updated},
	storagev1.Disposal_ServiceDesc.ServiceName:    {uid.Machined},
	storagev1.Attestation_ServiceDesc.ServiceName: {uid.Trustd},
}

// Callers is who may call what, besides apid and machined's Control: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers }

// newSlots returns the service for updated. The table is edited by the same function as for volumes, which takes one edit at a time.
func newSlots(l *linux, log *slog.Logger) *slots.Server {
	disk := slots.NewLinux(func(disk string, change func(*gpt.Table) error) error {
		return l.table(disk, func(_ *os.File, t *gpt.Table) error { return change(t) })
	}, func() string { return l.under(l.rootDev(), 0) })
	return &slots.Server{Linux: disk, Store: slots.New(slots.Config{
		Disk: disk, Epochs: epochs{l.vault}, Architecture: runtime.GOARCH, Version: strings.TrimPrefix(version.Version, "v"), Log: log,
		Keys: func() (bundle.Keys, error) {
			text, err := os.ReadFile(releaseKeys)
			if err != nil {
				return nil, err
			}
			return bundle.ParseKeys(text)
		},
	})}
}

// epochs keeps the floor of epochs in the TPM, where the policy of sealed keys looks for it.
type epochs struct{ vault *vault.Vault }

func (e epochs) Floor(context.Context) (int, bool, error) { return e.vault.Epoch() }

func (e epochs) Raise(_ context.Context, epoch int) error { return e.vault.RaiseEpoch(epoch) }
