package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// QMP gives the machine's QEMU a command without arguments, such as "system_reset", and waits until it is accepted.
func (m Machine) QMP(ctx context.Context, command string) error { return m.Order(ctx, command, nil) }

// Order is QMP for a command with arguments: a map or struct that becomes their JSON object, nil for none.
func (m Machine) Order(ctx context.Context, command string, arguments any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// Through the folder's descriptor: a socket's name may have 107 bytes only.
	dir, err := os.Open(m.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), qmpSocket))
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, errors.Unwrap(err))
	}
	defer conn.Close()
	if t, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(t); err != nil {
			return err
		}
	}
	if err := talk(conn, order{Execute: "qmp_capabilities"}, order{command, arguments}); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return nil
}

// An order is a command as QEMU wants it.
type order struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
}

// talk sends commands and reads until each is answered; greetings and events are skipped.
func talk(conn net.Conn, orders ...order) error {
	dec := json.NewDecoder(conn)
	for _, o := range orders {
		command := o.Execute
		if err := json.NewEncoder(conn).Encode(o); err != nil {
			return fmt.Errorf("qmp %s: %w", command, err)
		}
		for {
			var answer struct {
				Return *json.RawMessage
				Error  *struct{ Desc string }
			}
			if err := dec.Decode(&answer); err != nil {
				return fmt.Errorf("qmp %s: %w", command, err)
			}
			if answer.Error != nil {
				return fmt.Errorf("qmp %s: %s", command, answer.Error.Desc)
			}
			if answer.Return != nil {
				break
			}
		}
	}
	return nil
}
