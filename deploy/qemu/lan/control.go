package lan

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	controlSocket = "control.sock"
	controlLimit  = 5 * time.Second
	maxOrder      = 1 << 20
)

// A Rule says what happens to frames from some ports to others. A frame is subject to all rules that match it: their delays add up, and the greatest loss counts.
type Rule struct {
	// From and To are names of ports. None means all.
	From []string `json:"from,omitempty"`
	To   []string `json:"to,omitempty"`
	// Both makes the rule count in the other direction too.
	Both bool `json:"both,omitempty"`
	// Loss is the share of frames that is lost, by chance: 0 none, 1 all.
	Loss float64 `json:"loss,omitempty"`
	// Delay holds each frame back. What waits is bounded (1 MiB for each port); more is lost.
	Delay time.Duration `json:"delay,omitempty"`
}

// Cut is a rule that lets nothing through between two sets of ports, in both directions.
func Cut(a, b []string) Rule { return Rule{From: a, To: b, Both: true, Loss: 1} }

func (r Rule) check() error {
	if r.Loss < 0 || r.Loss > 1 {
		return fmt.Errorf("rule: loss %v is not in 0 to 1", r.Loss)
	}
	if r.Delay < 0 || r.Delay > time.Minute {
		return fmt.Errorf("rule: delay %s is not in 0s to 1m0s", r.Delay)
	}
	return nil
}

// effect is what the rules do to a frame. It is pure.
func effect(rules []Rule, from, to string) (loss float64, delay time.Duration) {
	in := func(set []string, name string) bool { return len(set) == 0 || slices.Contains(set, name) }
	for _, r := range rules {
		if in(r.From, from) && in(r.To, to) || r.Both && in(r.From, to) && in(r.To, from) {
			loss, delay = max(loss, r.Loss), delay+r.Delay
		}
	}
	return loss, delay
}

// PortStatus is what a switch tells of a port that is connected. Counters are of this connection.
type PortStatus struct {
	Name string `json:"name"`
	// Learned are the Ethernet addresses that were seen at the port.
	Learned []string `json:"learned"`
	// Received and Sent are frames from and to the machine; Lost those that it was too slow for, Cut those that rules took.
	Received uint64 `json:"received"`
	Sent     uint64 `json:"sent"`
	Lost     uint64 `json:"lost"`
	Cut      uint64 `json:"cut"`
}

// Status is a switch's.
type Status struct {
	Ports []PortStatus `json:"ports"` // ordered by name
	Rules []Rule       `json:"rules"`
}

// order is what a client sends, one line of JSON, and answer what it gets.
type order struct {
	Op    string `json:"op"` // "status", "rules", "stop"
	Rules []Rule `json:"rules,omitempty"`
}
type answer struct {
	Error  string `json:"error,omitempty"`
	Status Status `json:"status"`
}

// serve answers clients of the control socket, each for one order.
func (s *Switch) serve(ctx context.Context, g *errgroup.Group) error {
	g.Go(func() error { <-ctx.Done(); return s.listen.Close() })
	for {
		conn, err := s.listen.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("lan: control socket: %w", err)
		}
		g.Go(func() error {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			s.answer(conn)
			return nil
		})
	}
}

func (s *Switch) answer(conn net.Conn) {
	if err := conn.SetDeadline(time.Now().Add(controlLimit)); err != nil {
		return
	}
	var o order
	var a answer
	if err := json.NewDecoder(io.LimitReader(conn, maxOrder)).Decode(&o); err != nil {
		a.Error = err.Error()
	} else if err := s.obey(o); err != nil {
		a.Error = err.Error()
	}
	a.Status = s.Status()
	if err := json.NewEncoder(conn).Encode(a); err != nil {
		s.cfg.Log.Warn("control", "err", err)
	}
	if o.Op == "stop" { // after the answer: stopping closes the connection
		s.once.Do(func() { close(s.stop) })
	}
}

func (s *Switch) obey(o order) error {
	switch o.Op {
	case "status", "stop":
		return nil
	case "rules":
		return s.SetRules(o.Rules)
	}
	return fmt.Errorf("order %q is none of status, rules, stop", o.Op)
}

// SetRules replaces all rules at once. Frames that wait already are not changed.
func (s *Switch) SetRules(rules []Rule) error {
	for _, r := range rules {
		if err := r.check(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = slices.Clone(rules)
	return nil
}

// Status looks at the switch.
func (s *Switch) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	learned := map[*port][]string{}
	for m, p := range s.table {
		learned[p] = append(learned[p], net.HardwareAddr(m[:]).String())
	}
	st := Status{Ports: []PortStatus{}, Rules: append([]Rule{}, s.rules...)}
	for _, p := range s.ports {
		slices.Sort(learned[p])
		st.Ports = append(st.Ports, PortStatus{Name: p.Name, Learned: append([]string{}, learned[p]...),
			Received: p.received.Load(), Sent: p.sent.Load(), Lost: p.lost.Load(), Cut: p.cut.Load()})
	}
	slices.SortFunc(st.Ports, func(a, b PortStatus) int { return strings.Compare(a.Name, b.Name) })
	return st
}

// A Control gives orders to the switch whose folder it is. The error of each call wraps fs.ErrNotExist or ECONNREFUSED if no switch runs there.
type Control struct{ Dir string }

// SetRules replaces all rules of the switch at once; none heals everything.
func (c Control) SetRules(ctx context.Context, rules ...Rule) error {
	_, err := c.do(ctx, order{Op: "rules", Rules: rules})
	return err
}

// Status asks which machines are connected, and what became of their frames.
func (c Control) Status(ctx context.Context) (Status, error) { return c.do(ctx, order{Op: "status"}) }

// Stop ends the switch; it returns when that was accepted.
func (c Control) Stop(ctx context.Context) error {
	_, err := c.do(ctx, order{Op: "stop"})
	return err
}

func (c Control) do(ctx context.Context, o order) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	conn, err := dialUnix(ctx, filepath.Join(c.Dir, controlSocket))
	if err != nil {
		return Status{}, fmt.Errorf("switch: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var a answer
	if err := errors.Join(json.NewEncoder(conn).Encode(o), json.NewDecoder(io.LimitReader(conn, maxOrder)).Decode(&a)); err != nil {
		return Status{}, fmt.Errorf("switch: %s: %w", o.Op, err)
	}
	if a.Error != "" {
		return a.Status, fmt.Errorf("switch: %s", a.Error)
	}
	return a.Status, nil
}
