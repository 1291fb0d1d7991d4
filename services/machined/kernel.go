package machined

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// A host is the part of Linux that machined reads.
type host interface {
	// State returns the folder for generations; the error wraps fs.ErrNotExist until STATE is mounted.
	State() (store.FS, error)
	// Release is the kernel's, as uname(2) has it.
	Release() string
	// Boot is when the clock of the kernel's log was zero.
	Boot() time.Time
	KernelLogSize() (int, error)
	KernelLog([]byte) (int, error)
	// Usage returns the memory of a unit's control group in bytes and its processor time in seconds; zeros if unknown.
	Usage(unit string) (memory uint64, cpu float64)
	// MemoryLimit returns the limit of a unit's control group in bytes; 0 if there is none, or it is unknown.
	MemoryLimit(unit string) uint64
}

type linux struct{}

func (linux) State() (store.FS, error) {
	f, err := store.OpenFolder(unit.StateDir+"/machined", "generations")
	if errors.Is(err, fs.ErrPermission) {
		// storaged makes the folder first and gives it to us then.
		return nil, fmt.Errorf("%w (%w)", fs.ErrNotExist, err)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (linux) Release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (linux) Boot() time.Time {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(t.Nano()))
}

// The kernel's log is read by syslog(2), which needs CAP_SYSLOG and no device.
func (linux) KernelLogSize() (int, error) {
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
	return n, os.NewSyscallError("syslog: size of the kernel's log", err)
}

func (linux) KernelLog(buf []byte) (int, error) {
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	return n, os.NewSyscallError("syslog: read the kernel's log", err)
}

func (linux) Usage(name string) (memory uint64, cpu float64) {
	group := group(name)
	if data, err := os.ReadFile(group + "/memory.current"); err == nil {
		if memory, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err != nil {
			memory = 0
		}
	}
	if data, err := os.ReadFile(group + "/cpu.stat"); err == nil {
		cpu = cpuSeconds(data)
	}
	return memory, cpu
}

func (linux) MemoryLimit(name string) uint64 {
	data, err := os.ReadFile(group(name) + "/memory.max")
	if err != nil {
		return 0
	}
	limit, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil { // "max"
		return 0
	}
	return limit
}

// group is a unit's control group; PID 1 takes no names with slashes or dots.
func group(name string) string {
	const groups = "/sys/fs/cgroup/bulkhead/"
	if _, err := os.Stat(groups + name); err != nil {
		return groups + "workload/" + name
	}
	return groups + name
}

// cpuSeconds reads usage_usec of a cpu.stat.
func cpuSeconds(data []byte) float64 {
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		if digits, ok := strings.CutPrefix(s.Text(), "usage_usec "); ok {
			if n, err := strconv.ParseUint(digits, 10, 64); err == nil {
				return float64(n) / 1e6
			}
		}
	}
	return 0
}

// conn is a link over a daemon's socket.
type conn struct {
	conn   *grpc.ClientConn
	client controlv1.ControlClient
}

// buffers of connections that carry little, in bytes.
const buffers = 4 << 10

func dial(daemon string) (conn, error) {
	c, err := peer.Dial(peer.Socket(daemon), grpc.WithReadBufferSize(buffers), grpc.WithWriteBufferSize(buffers))
	return conn{c, controlv1.NewControlClient(c)}, err
}

func (c conn) Watch(ctx context.Context, f func(*controlv1.State)) error {
	stream, err := c.client.WatchState(ctx, &controlv1.WatchStateRequest{})
	for err == nil {
		var st *controlv1.State
		if st, err = stream.Recv(); err == nil {
			f(st)
		}
	}
	return err
}

func (c conn) Set(ctx context.Context, s *controlv1.Spec) error {
	_, err := c.client.SetSpec(ctx, &controlv1.SetSpecRequest{Spec: s})
	return err
}

func (c conn) Plan(ctx context.Context, s *controlv1.Spec) ([]string, error) {
	r, err := c.client.PlanSpec(ctx, &controlv1.PlanSpecRequest{Spec: s})
	if grpcstatus.Code(err) == codes.Unimplemented {
		return nil, nil // a daemon that only takes note of its section
	}
	return r.GetSteps(), err
}

func (c conn) Metrics(ctx context.Context) ([]*controlv1.Family, error) {
	r, err := c.client.ReadMetrics(ctx, &controlv1.ReadMetricsRequest{})
	return r.GetFamilies(), err
}

// distant are the daemons that a reset needs, over their sockets.
type distant struct {
	etcd      etcdv1.EtcdClient
	storage   storagev1.DisposalClient
	departure trustv1.DepartureClient
}

func (d *distant) Members(ctx context.Context) (int, bool, error) {
	s, err := d.etcd.GetStatus(ctx, &etcdv1.GetStatusRequest{})
	return len(s.GetMembers()), s.GetState() == "left" || s.GetState() == "removed", err
}

func (d *distant) LeaveEtcd(ctx context.Context) error {
	_, err := d.etcd.Leave(ctx, &etcdv1.LeaveRequest{})
	return err
}

func (d *distant) LeaveCluster(ctx context.Context) error {
	_, err := d.departure.Leave(metadata.AppendToOutgoingContext(ctx, peer.NodeKey, peer.ControlPlanes), &trustv1.LeaveRequest{})
	return err
}

func (d *distant) Destroy(ctx context.Context, removeOS, force bool, say func(string, bool)) ([]string, error) {
	stream, err := d.storage.Destroy(ctx, &storagev1.DestroyRequest{RemoveOs: removeOS, Force: force})
	if err != nil {
		return nil, err
	}
	for {
		p, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil, errs.New(errs.Unavailable, "it ended without a last word")
		case err != nil:
			return nil, err
		case len(p.GetFacts()) > 0:
			return p.GetFacts(), nil
		}
		say(p.GetStep(), p.GetBegun())
	}
}
