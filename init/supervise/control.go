package supervise

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// At most so many connections, and of one user.
const (
	maxConns = 64
	maxUser  = 16
)

// A conn is one connection to the control socket.
type conn struct {
	fd      int
	uid     uint32
	news    map[*service]bool // units to be sent again; nil: it does not follow
	blocked bool              // it has not read what it was sent
}

// allowed says how PID 1 answers a user's request. u is the unit that it names, nil if there is none of that name.
func allowed(user uint32, v initctl.Verb, u *unit.Unit) initctl.Code {
	mine := false // the unit is
	switch v {
	case initctl.List, initctl.Follow:
		return initctl.OK
	case initctl.Start, initctl.Stop, initctl.Restart:
		mine = u != nil && slices.Contains(u.Owners, user)
		fallthrough
	case initctl.Logs:
		if u == nil {
			return initctl.NotFound
		}
	case initctl.Reboot:
		mine = user == uint32(uid.Updated) // a version on trial that proved nothing: machined may be what does not work
	}
	if mine || user == uint32(uid.Machined) {
		return initctl.OK
	}
	return initctl.Denied
}

func (s *Supervisor) serve(path string) error {
	var f console.First
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	f.Try("socket", err)
	f.Try("bind "+path, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	f.Try("mode of "+path, unix.Chmod(path, 0o666))
	f.Try("listen on "+path, unix.Listen(fd, maxConns))
	s.watch(fd, unix.EPOLLIN, func() { s.accept(fd) })
	return f.Err
}

func (s *Supervisor) accept(listener int) {
	fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return
	}
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	same := 0
	for _, c := range s.conns {
		if err == nil && c.uid == peer.Uid {
			same++
		}
	}
	if err != nil || len(s.conns) >= maxConns || same >= maxUser {
		send(fd, initctl.Record{Code: initctl.Busy}, nil)
		unix.Close(fd)
		return
	}
	c := &conn{fd: fd, uid: peer.Uid}
	s.conns[fd] = c
	s.watch(fd, unix.EPOLLIN, func() {
		if err := s.answer(c); err != nil {
			delete(s.conns, fd)
			s.forget(fd)
		}
	})
}

// answer reads one request and answers it. After an error the connection is to be closed.
func (s *Supervisor) answer(c *conn) error {
	if c.blocked {
		c.blocked = false
		s.interest(c.fd, unix.EPOLLIN)
	}
	var buf [initctl.RequestSize + 1]byte // one more, to see that a message is too long
	n, err := unix.Read(c.fd, buf[:])
	if err == unix.EAGAIN {
		return nil
	}
	if err != nil || n == 0 {
		return unix.ECONNRESET
	}
	req, err := initctl.DecodeRequest(buf[:n])
	if err != nil || c.news != nil {
		send(c.fd, initctl.Record{Code: initctl.Invalid}, nil)
		return unix.EBADMSG
	}
	v, u := (*service)(nil), (*unit.Unit)(nil)
	if i := slices.IndexFunc(s.units, func(v *service) bool { return v.Name == req.Unit }); i >= 0 {
		v, u = s.units[i], s.units[i].Unit
	}
	r := initctl.Record{Code: allowed(c.uid, req.Verb, u), Unit: req.Unit}
	if s.halting && (req.Verb == initctl.Start || req.Verb == initctl.Restart) && r.Code == initctl.OK {
		r.Code = initctl.Halting
	}
	if r.Code != initctl.OK {
		return send(c.fd, r, nil)
	}
	switch req.Verb {
	case initctl.List:
		for i, v := range s.units {
			r := v.record()
			r.Left = uint32(len(s.units) - 1 - i)
			if err := send(c.fd, r, nil); err != nil {
				return err
			}
		}
		return nil
	case initctl.Follow:
		c.news = map[*service]bool{}
		for _, v := range s.units {
			c.news[v] = true
		}
		return nil
	case initctl.Logs:
		return send(c.fd, v.record(), unix.UnixRights(v.log.read))
	case initctl.Reboot, initctl.PowerOff:
		s.order = req.Verb
	case initctl.Stop:
		s.happen(v, Stop)
	case initctl.Start:
		s.happen(v, Start)
	case initctl.Restart:
		s.happen(v, Stop)
		s.happen(v, Start)
	}
	return send(c.fd, r, nil)
}

// changed notes that whoever follows has to hear of the unit.
func (s *Supervisor) changed(v *service) {
	for _, c := range s.conns {
		if c.news != nil {
			c.news[v] = true
		}
	}
}

// tell sends the news to all that follow. Who does not read gets the newest when he does.
func (s *Supervisor) tell() {
	for _, c := range s.conns {
		for v := range c.news {
			if c.blocked {
				break
			}
			if err := send(c.fd, v.record(), nil); err == nil {
				delete(c.news, v)
			} else { // full, or closed, which the next read will show
				c.blocked = true
				s.interest(c.fd, unix.EPOLLIN|unix.EPOLLOUT)
			}
		}
	}
}

func (v *service) record() initctl.Record {
	return initctl.Record{
		State: uint8(v.state), End: v.end, Value: v.value, PID: uint32(v.pid), Restarts: v.restarts, Since: v.since.UnixNano(), Unit: v.Name,
	}
}

func send(fd int, r initctl.Record, rights []byte) error {
	p := r.Encode()
	return unix.Sendmsg(fd, p[:], rights, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// watch has do called when the descriptor is ready, until forget closes it.
func (s *Supervisor) watch(fd int, events uint32, do func()) {
	s.on[fd] = do
	unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (s *Supervisor) interest(fd int, events uint32) {
	unix.EpollCtl(s.epoll, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (s *Supervisor) forget(fd int) {
	delete(s.on, fd)
	unix.Close(fd)
}
