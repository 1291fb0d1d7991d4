package etcdd

import (
	"context"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/services/etcdd/rolling"
)

// newRolling is this node's part of changing all nodes, which it may carry out while its own member votes.
func (d *Daemon) newRolling(kubernetes rolling.Drainer, witness func(context.Context, string) error) *rolling.Coordinator {
	if kubernetes == nil {
		kubernetes = noPods{}
	}
	return rolling.New(rolling.Config{
		Log:  d.env.Log,
		Name: func() string { s, _ := d.loop.Spec(); return s.Name },
		Get:  d.kernel.get,
		Txn: func(ctx context.Context, conditions []clientv3.Cmp, ops []clientv3.Op) (bool, error) {
			w, err := d.kernel.txn(ctx, conditions, ops...)
			return w.done, err
		},
		Follow: d.kernel.watch,
		Nodes:  d.registry.list, Voters: d.spare, Kubernetes: kubernetes, Witness: witness, Tell: d.status.tellRolling,
	})
}

// spare returns the leader's name, and why no member may be away for a moment.
func (d *Daemon) spare(ctx context.Context) (string, error) {
	all, err := d.kernel.voices(ctx)
	if err != nil {
		return "", err
	}
	return maySpare(all)
}

// maySpare wants all members to vote, to answer, and to follow a leader: one of three that is away already makes the next one the last. It is pure.
func maySpare(all []voice) (leader string, err error) {
	var wrong []string
	for _, v := range all {
		switch {
		case v.learner || v.name == "":
			wrong = append(wrong, fmt.Sprintf("%s is only joining", v))
		case !v.answers:
			wrong = append(wrong, fmt.Sprintf("%s does not answer", v))
		}
		if v.leads {
			leader = v.name
		}
	}
	switch {
	case len(wrong) > 0:
		return leader, errs.New(errs.Precondition, "etcd can spare no member: %s", strings.Join(wrong, ", "))
	case leader == "":
		return "", errs.New(errs.Unavailable, "etcd has no leader")
	}
	return leader, nil
}

// noPods is a cluster without Kubernetes.
type noPods struct{}

func (noPods) Drain(context.Context, string, string) ([]string, error) { return nil, nil }
func (noPods) Release(context.Context, string, string) error           { return nil }

// pods is Kubernetes, of which this node's kubeletd knows.
type pods struct{ kubeletd kubernetesv1.DrainClient }

// drainTime bounds one call; two of them and a renewal are shorter than the lease of a coordinator (rolling.leaseTime).
const drainTime = 10 * time.Second

func (p pods) Drain(ctx context.Context, node, id string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	r, err := p.kubeletd.Empty(ctx, &kubernetesv1.EmptyRequest{Node: node, Change: id})
	return r.GetLeft(), err
}

func (p pods) Release(ctx context.Context, node, id string) error {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	_, err := p.kubeletd.Release(ctx, &kubernetesv1.ReleaseRequest{Node: node, Change: id})
	return err
}

// witnessTime bounds one call.
const witnessTime = 5 * time.Second

// witness calls another node's machined through both apids.
func witness(c machinev1.TrialClient) func(context.Context, string) error {
	return func(ctx context.Context, node string) error {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, peer.NodeKey, node), witnessTime)
		defer cancel()
		_, err := c.Witness(ctx, &machinev1.WitnessRequest{})
		return err
	}
}
