package balance

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// conn is one client's connection and the backend's that belongs to it.
type conn struct{ client, server net.Conn }

// close ends both at once; pipe then returns.
func (c *conn) close() {
	c.client.Close()
	c.server.Close()
}

// pipe moves bytes both ways until both sides have ended or one is broken. An end of one side is passed on, and the other may still
// speak; nothing is read that cannot be written, so a slow side slows the other one down. Between TCP sockets io.Copy lets the kernel
// move the bytes (splice(2)).
func (c *conn) pipe() {
	defer c.close()
	var both sync.WaitGroup
	both.Go(func() { c.half(c.server, c.client) })
	both.Go(func() { c.half(c.client, c.server) })
	both.Wait()
}

func (c *conn) half(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if err == nil {
		if w, ok := to.(interface{ CloseWrite() error }); ok {
			err = w.CloseWrite()
		} else {
			err = errors.New("the connection has no halves")
		}
	}
	if err != nil { // reset, or closed by us: the other half has nobody to speak to
		c.close()
	}
}

// tooMany reports whether an error of Accept goes away by waiting: descriptors or memory are short, or the client left already.
func tooMany(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
