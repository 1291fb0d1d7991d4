package twin

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Internal are the daemons behind whose sockets services without a served_by option are. TestServices holds it to the daemons' lists.
var Internal = map[string][]string{
	"control.v1.Control":                       {"apid", "etcdd", "gateway", "kubeletd", "networkd", "storaged", "trustd", "updated"}, // machined is who calls it
	"grpc.health.v1.Health":                    Daemons(),
	"kubernetes.v1.Drain":                      {"kubeletd"},
	"keys.v1.KeyService":                       nil, // of a machine elsewhere
	"keys.v1.Relay":                            {"updated"},
	"network.v1.Pods":                          {"networkd"},
	"network.v1.Virtual":                       {"networkd"},
	"outbound.v1.Outbound":                     {"apid"},
	"slot.v1.Slots":                            {"storaged"},
	"storage.v1.Attestation":                   {"storaged"},
	"storage.v1.Disposal":                      {"storaged"},
	"store.v1.Store":                           {"etcdd"},
	"trust.v1.Signer":                          {"trustd"},
	"v1.ExternalJWTSigner":                     {"trustd"},
	"v2.KeyManagementService":                  {"trustd"},
	"grpc.reflection.v1.ServerReflection":      {"apid"},
	"grpc.reflection.v1alpha.ServerReflection": {"apid"},
}

// Strange are methods that are not of our protos, by service.
var Strange = map[string][]string{
	"grpc.health.v1.Health":                    {"Check", "Watch"},
	"grpc.reflection.v1.ServerReflection":      {"ServerReflectionInfo"},
	"grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo"},
	"v1.ExternalJWTSigner":                     {"Sign", "FetchKeys", "Metadata"},
	"v2.KeyManagementService":                  {"Status", "Decrypt", "Encrypt"},
}

// Behind returns the full names of all methods that the socket of a daemon has, sorted.
func Behind(daemon string) (out []string) {
	for _, m := range methods.All() {
		at := Internal[m.Service]
		if m.ServedBy != "" {
			at = []string{m.ServedBy}
			if daemon == "apid" { // passes it on
				at = append(at, "apid")
			}
		}
		if slices.Contains(at, daemon) {
			out = append(out, m.Full())
		}
	}
	for service, names := range Strange {
		if slices.Contains(Internal[service], daemon) {
			for _, n := range names {
				out = append(out, "/"+service+"/"+n)
			}
		}
	}
	slices.Sort(out)
	return out
}

// sockets connects to every socket there is.
func sockets() (out []Probe) {
	for _, s := range append(Daemons(), Others()...) {
		path := unit.SocketDir + "/" + s + ".sock"
		out = append(out, Probe{Group: Sockets, Name: path, Socket: s, Calls: []string{"socket", "connect"}, Family: "unix", Maybe: !slices.Contains(Daemons(), s), run: func(*env) string {
			return connect(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: path})
		}})
	}
	out = append(out, Probe{Group: Sockets, Name: unit.InitSocket, Socket: "init", Family: "unix", Calls: []string{"socket", "connect"}, run: func(*env) string {
		return connect(unix.AF_UNIX, unix.SOCK_SEQPACKET, &unix.SockaddrUnix{Name: unit.InitSocket})
	}})
	for _, path := range []string{"/run/containerd/containerd.sock", "/run/containerd/containerd.sock.ttrpc", "/run/dbus/system_bus_socket", "/run/systemd/private"} {
		out = append(out, Probe{Group: Sockets, Name: path, Socket: "nobody", Family: "unix", Calls: []string{"socket", "connect"}, Nobody: true, run: func(*env) string {
			return connect(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: path})
		}})
	}
	return out
}

func connect(domain, kind int, to unix.Sockaddr) string {
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return says(err)
	}
	defer unix.Close(fd)
	return says(unix.Connect(fd, to))
}

// rpcs calls every method behind every daemon's socket, and one that is not there.
func rpcs() (out []Probe) {
	for _, d := range Daemons() {
		for _, m := range append(Behind(d), "/nobody.v1.Nobody/Nothing") {
			out = append(out, Probe{Group: RPCs, Name: d + m, Socket: d, Method: m, Family: "unix", Calls: []string{"socket", "connect"}, run: func(e *env) string { return e.call(d, m) }})
		}
	}
	return out
}

// A way is a connection to a daemon.
type way struct{ conn *grpc.ClientConn }

// call makes one call with an empty message and the mark that has the daemon answer before it does anything.
func (e *env) call(daemon, method string) string {
	w := e.conns[daemon]
	if w == nil {
		conn, err := grpc.NewClient("unix://"+unit.SocketDir+"/"+daemon+".sock", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Hour, Multiplier: 1, MaxDelay: time.Hour}, MinConnectTimeout: 20 * time.Second}))
		if err != nil {
			return err.Error()
		}
		w = &way{conn: conn}
		e.conns[daemon] = w
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "bulkhead-twin", "1"), 30*time.Second)
	defer cancel()
	answer := reply(w.invoke(ctx, method))
	if answer != OK && answer != List && answer != Unserved { // each call by a connection of its own, where connections are ended
		_ = w.conn.Close()
		delete(e.conns, daemon)
	}
	return answer
}

func (w *way) invoke(ctx context.Context, method string) error {
	desc := &grpc.StreamDesc{StreamName: method, ClientStreams: true, ServerStreams: true}
	s, err := w.conn.NewStream(ctx, desc, method)
	if err != nil {
		return err
	}
	if err := errors.Join(s.SendMsg(&emptypb.Empty{}), s.CloseSend()); err != nil && status.Code(err) != codes.Unknown { // EOF: RecvMsg has the reason
		return err
	}
	return s.RecvMsg(&emptypb.Empty{})
}

// letIn is peer.LetIn, which is there with the build tag only.
const letIn = "twin: the list lets it in"

func reply(err error) string {
	s := status.Convert(err)
	switch {
	case s.Code() == codes.Aborted && s.Message() == letIn:
		return OK
	case s.Code() == codes.PermissionDenied && strings.HasSuffix(s.Message(), "may not call it"):
		return List
	case s.Code() == codes.Unimplemented:
		return Unserved
	case s.Code() == codes.DeadlineExceeded:
		return Silent
	case s.Code() == codes.Unavailable:
		for _, n := range []string{"permission denied", "no such file", "operation not permitted", "errno 4090"} {
			if strings.Contains(s.Message(), n) {
				return map[string]string{"permission denied": "EACCES", "no such file": "ENOENT", "operation not permitted": "EPERM", "errno 4090": Filter}[n]
			}
		}
		for _, n := range []string{"error reading server preface", "connection reset", "EOF", "broken pipe"} {
			if strings.Contains(s.Message(), n) {
				return Door
			}
		}
	}
	return s.Code().String() + ": " + s.Message()
}

func (e *env) close() {
	for _, w := range e.conns {
		_ = w.conn.Close()
	}
}

// ordered are the verbs of PID 1 by name.
var ordered = []struct {
	name string
	verb initctl.Verb
	do   func(*initctl.Client, string) error
}{
	{"start", initctl.Start, (*initctl.Client).Start}, {"stop", initctl.Stop, (*initctl.Client).Stop}, {"restart", initctl.Restart, (*initctl.Client).Restart},
	{"logs", initctl.Logs, func(c *initctl.Client, u string) error {
		f, err := c.Logs(u)
		if err == nil {
			err = f.Close()
		}
		return err
	}},
}

// verbs gives PID 1 every order about every unit.
func verbs() (out []Probe) {
	needs := Probe{Group: Verbs, Socket: "init", Family: "unix", Calls: []string{"socket", "connect", "recvmsg"}}
	order := func(name, verb, about string, do func(*initctl.Client) error) {
		p := needs
		p.Name, p.Verb, p.Unit = name, verb, about
		p.run = func(e *env) string {
			if verb != "list" && (e.name == "machined" || verb == "reboot" && e.name == "updated") {
				return Untried // it may
			}
			c, err := initctl.Dial("")
			if err == nil {
				err = do(c)
				_ = c.Close()
			}
			var code initctl.Code
			if errors.As(err, &code) {
				return map[initctl.Code]string{initctl.Denied: List, initctl.NotFound: "ENOENT"}[code]
			}
			return says(err)
		}
		out = append(out, p)
	}
	order("list", "list", "", func(c *initctl.Client) error { _, err := c.Status(); return err })
	order("reboot", "reboot", "", (*initctl.Client).Reboot)
	order("power off", "power off", "", (*initctl.Client).PowerOff)
	for _, u := range append(Daemons(), Others()...) {
		for _, v := range ordered {
			order(v.name+" "+u, v.name, u, func(c *initctl.Client) error { return v.do(c, u) })
		}
	}
	return out
}

// meet learns the numbers of the other units' processes, which PID 1 tells everybody.
func (e *env) meet() {
	e.pids = map[string]int{"init": 1}
	c, err := initctl.Dial("")
	if err != nil {
		return
	}
	defer c.Close()
	all, _ := c.Status()
	for _, s := range all {
		if s.PID != 0 {
			e.pids[s.Name] = s.PID
		}
	}
}
