package dm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNone: there is no device of that name.
var ErrNone = errors.New("there is no such device")

// Control is the way to device-mapper. It needs SYS_ADMIN. It may be used by several goroutines.
type Control struct{ f *os.File }

// Open opens the kernel's node, /dev/mapper/control. An error that is os.ErrNotExist says that the kernel has no device-mapper.
func Open(path string) (*Control, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &Control{f}, nil
}

// Close leaves devices as they are.
func (c *Control) Close() error { return c.f.Close() }

// do sends a message and wipes what came back, after use has read it.
func (c *Control) do(command uintptr, what string, b []byte, use func([]byte) error) error {
	defer clear(b)
	err := ioctl(c.f, command, b)
	switch {
	case errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%s: %w", what, ErrNone)
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case use != nil:
		return use(b)
	}
	return nil
}

func (c *Control) simple(command uintptr, what, name, uuid string, flags uint32, use func([]byte) error) error {
	b, err := message(name, uuid, flags, 0)
	if err != nil {
		return err
	}
	return c.do(command, what+" "+name, b, use)
}

// Create makes a device and starts it. If that fails half way, nothing is left of it. The kernel makes the node /dev/dm-<minor>.
func (c *Control) Create(name, uuid string, table Crypt) (Status, error) {
	if err := c.simple(cmdCreate, "create", name, uuid, 0, nil); err != nil {
		return Status{}, err
	}
	var s Status
	err := c.load(name, table)
	if err == nil {
		err = c.simple(cmdSuspend, "start", name, "", 0, func(b []byte) error { s = parseStatus(b); return nil })
	}
	if err != nil {
		return Status{}, errors.Join(err, c.Remove(name))
	}
	return s, nil
}

func (c *Control) load(name string, table Crypt) error {
	b, err := loadMessage(name, table)
	if err != nil {
		return err
	}
	return c.do(cmdLoad, "load the table of "+name, b, nil)
}

// Reload exchanges a device's table while it is in use: whoever reads or writes meanwhile waits.
func (c *Control) Reload(name string, table Crypt) error {
	if err := c.load(name, table); err != nil {
		return err
	}
	if err := c.simple(cmdSuspend, "pause", name, "", flagSuspend, nil); err != nil {
		return errors.Join(err, c.simple(cmdSuspend, "start", name, "", 0, nil))
	}
	return c.simple(cmdSuspend, "start", name, "", 0, nil)
}

// Remove takes a device away; it must not be open. One that is gone already is ErrNone.
func (c *Control) Remove(name string) error { return c.simple(cmdRemove, "remove", name, "", 0, nil) }

// Status asks for a device; ErrNone if there is none.
func (c *Control) Status(name string) (s Status, err error) {
	err = c.simple(cmdStatus, "status of", name, "", 0, func(b []byte) error { s = parseStatus(b); return nil })
	return s, err
}

// Table returns a device's table with its key. The caller wipes it.
func (c *Control) Table(name string) (table Crypt, err error) {
	b, err := message(name, "", flagTable, 4096)
	if err != nil {
		return Crypt{}, err
	}
	err = c.do(cmdTable, "table of "+name, b, func(b []byte) error {
		table, err = parseTable(b)
		return err
	})
	return table, err
}
