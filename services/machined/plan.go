package machined

import (
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
)

// A recipient is a daemon that gets sections of the document.
type recipient struct {
	daemon string
	kinds  []config.Kind
}

// recipients is the one list of who gets what, sorted by name.
var recipients = []recipient{
	{"apid", []config.Kind{config.KindMachine, config.KindCluster, config.KindAccess}},
	{"etcdd", []config.Kind{config.KindMachine, config.KindCluster}},
	{"gateway", []config.Kind{config.KindMachine, config.KindCluster}},
	{"kubeletd", []config.Kind{config.KindMachine, config.KindCluster, config.KindKubernetes}},
	{"networkd", []config.Kind{config.KindMachine, config.KindNetwork, config.KindCluster, config.KindKubernetes}},
	{storaged, []config.Kind{config.KindStorage}},
	{"trustd", []config.Kind{config.KindMachine, config.KindCluster, config.KindKubernetes, config.KindAccess}},
	{"updated", []config.Kind{config.KindUpdate}},
}

// storaged makes STATE, which machined itself needs.
const storaged = "storaged"

// spec returns what one daemon is to bring about.
func (r recipient) spec(generation uint64, set config.Set) *controlv1.Spec {
	return &controlv1.Spec{Generation: generation, Documents: config.Section(set, r.kinds...)}
}
