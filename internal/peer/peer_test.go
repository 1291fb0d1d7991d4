package peer

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// echo answers with the caller that it saw.
type echo struct {
	machinev1.UnimplementedMachineServer
	controlv1.UnimplementedControlServer
}

func (echo) GetVersion(ctx context.Context, _ *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	c := CallerFrom(ctx)
	return &machinev1.GetVersionResponse{Version: c.Name, Platform: strings.Join(c.Roles, ",")}, nil
}

func (echo) StreamEvents(_ *machinev1.StreamEventsRequest, s grpc.ServerStreamingServer[machinev1.Event]) error {
	return s.Send(&machinev1.Event{})
}

func (echo) ReadMetrics(context.Context, *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	return &controlv1.ReadMetricsResponse{}, nil
}

// start serves echo with machined allowed to call Control and apid the public services, and dials it as somebody.
func start(t *testing.T, who func(net.Conn) (uid.ID, error)) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	list := List{"control.v1.Control": {uid.Machined}, "/control.v1.Control/SetSpec": {uid.Timed}}
	s := grpc.NewServer(ServerOptions(list, who)...)
	machinev1.RegisterMachineServer(s, echo{})
	controlv1.RegisterControlServer(s, echo{})
	Public(s, list)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	conn, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func as(id uid.ID) func(net.Conn) (uid.ID, error) {
	return func(net.Conn) (uid.ID, error) { return id, nil }
}

func TestList(t *testing.T) {
	for _, c := range []struct {
		id              uid.ID
		public, control bool
	}{
		{uid.Apid, true, false}, {uid.Machined, false, true}, {uid.Timed, false, false},
	} {
		conn := start(t, as(c.id))
		_, err := machinev1.NewMachineClient(conn).GetVersion(t.Context(), &machinev1.GetVersionRequest{})
		if (err == nil) != c.public || (err != nil && !errs.Is(err, errs.Denied)) {
			t.Errorf("%s, unary public: %v, want allowed %v", c.id.Name(), err, c.public)
		}
		s, err := machinev1.NewMachineClient(conn).StreamEvents(t.Context(), &machinev1.StreamEventsRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		if (err == nil) != c.public {
			t.Errorf("%s, stream public: %v, want allowed %v", c.id.Name(), err, c.public)
		}
		_, err = controlv1.NewControlClient(conn).ReadMetrics(t.Context(), &controlv1.ReadMetricsRequest{})
		if (err == nil) != c.control {
			t.Errorf("%s, control: %v, want allowed %v", c.id.Name(), err, c.control)
		}
		// The entry of a method goes before that of its service.
		_, err = controlv1.NewControlClient(conn).SetSpec(t.Context(), &controlv1.SetSpecRequest{})
		if denied := errs.Is(err, errs.Denied); denied != (c.id != uid.Timed) {
			t.Errorf("%s, SetSpec: %v", c.id.Name(), err)
		}
	}
}

// A public service may have methods for daemons only; apid is let in to the others.
func TestInternalMethodOfPublicService(t *testing.T) {
	list := List{"peertest.Mixed": {uid.Timed}}
	list.public([]methods.Method{
		{Service: "peertest.Mixed", Name: "Look", ServedBy: "timed", Need: []authv1.Role{authv1.Role_READER}},
		{Service: "peertest.Mixed", Name: "Inside", ServedBy: "timed", Need: []authv1.Role{authv1.Role_INTERNAL}},
	})
	for _, c := range []struct {
		id           uid.ID
		look, inside bool
	}{{uid.Apid, true, false}, {uid.Timed, true, true}, {uid.Gateway, false, false}} {
		if look, inside := list.Allows(c.id, "/peertest.Mixed/Look"), list.Allows(c.id, "/peertest.Mixed/Inside"); look != c.look || inside != c.inside {
			t.Errorf("%s: Look %v, Inside %v; want %v, %v", c.id.Name(), look, inside, c.look, c.inside)
		}
	}
}

// The kernel's word is asked by default: a test runs as a user that is on no list, and is refused at the handshake.
func TestKernelsWord(t *testing.T) {
	if _, listed := map[int]bool{int(uid.Apid): true, int(uid.Machined): true, int(uid.Timed): true}[os.Getuid()]; listed {
		t.Skip("this user is on the list")
	}
	conn := start(t, nil)
	_, err := machinev1.NewMachineClient(conn).GetVersion(t.Context(), &machinev1.GetVersionRequest{}, grpc.WaitForReady(false))
	if err == nil {
		t.Error("a stranger got an answer")
	}
}

// Only apid's word about the caller counts.
func TestCaller(t *testing.T) {
	ctx := metadata.AppendToOutgoingContext(t.Context(), CallerKey, "alice", RolesKey, "reader", RolesKey, "operator")
	r, err := machinev1.NewMachineClient(start(t, as(uid.Apid))).GetVersion(ctx, &machinev1.GetVersionRequest{})
	if err != nil || r.Version != "alice" || r.Platform != "reader,operator" {
		t.Errorf("from apid: %v, %v; want alice with two roles", r, err)
	}
	list := CallerFrom(ctx)
	if list.Name != "" || list.Roles != nil {
		t.Errorf("from nobody: %v, want nothing", list)
	}
}

// Only what may be repeated is repeated.
func TestServiceConfig(t *testing.T) {
	var cfg struct {
		MethodConfig []struct {
			Name        []struct{ Service, Method string }
			RetryPolicy *struct{ MaxAttempts int }
		}
	}
	for method, want := range map[string]bool{"/cluster.v1.Registry/Report": true, "/machine.v1.Machine/Reboot": false, "": false} {
		if Repeatable(method) != want {
			t.Errorf("Repeatable(%q) is not %v", method, want)
		}
	}
	if strings.Contains(serviceConfig(false), `"waitForReady":true`) {
		t.Error("a brisk client waits")
	}
	if err := json.Unmarshal([]byte(serviceConfig(true)), &cfg); err != nil {
		t.Fatal(err)
	}
	retried := map[string]bool{}
	for _, m := range cfg.MethodConfig {
		for _, n := range m.Name {
			if m.RetryPolicy != nil {
				retried[n.Service+"/"+n.Method] = true
			}
		}
	}
	if !retried["machine.v1.Machine/GetVersion"] || !retried["control.v1.Control/SetSpec"] || retried["machine.v1.Machine/Reboot"] || retried["machine.v1.Machine/RestartService"] {
		t.Errorf("repeated: %v", retried)
	}
}
