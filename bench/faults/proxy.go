package main

import (
	"io"
	"net"
	"sync"
)

// proxy stands between a pool and the server, and breaks what goes through it.
type proxy struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	links map[*link]struct{}
}

// link is one connection through the proxy.
type link struct {
	client, server *net.TCPConn
	lost           chan struct{} // closed: nothing gets through any more
	once           sync.Once
}

func newProxy(target string) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: listener, target: target, links: make(map[*link]struct{})}
	go p.accept()
	return p, nil
}

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		l := &link{client: client.(*net.TCPConn), server: server.(*net.TCPConn), lost: make(chan struct{})}
		p.mu.Lock()
		p.links[l] = struct{}{}
		p.mu.Unlock()
		go l.pass(l.server, l.client)
		go l.pass(l.client, l.server)
	}
}

func (l *link) pass(to, from *net.TCPConn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		select {
		case <-l.lost:
			_, _ = io.Copy(io.Discard, from) // open, and mute
			return
		default:
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			_ = to.CloseWrite()
			return
		}
	}
}

func (p *proxy) each(do func(*link)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		do(l)
	}
	clear(p.links)
}

// reset cuts the connections there are with RST.
func (p *proxy) reset() {
	p.each(func(l *link) {
		for _, c := range []*net.TCPConn{l.client, l.server} {
			_ = c.SetLinger(0)
			_ = c.Close()
		}
	})
}

// lose lets nothing through the connections there are any more, and doesn't
// close them: as a load balancer does that has forgotten them.
func (p *proxy) lose() { p.each(func(l *link) { l.once.Do(func() { close(l.lost) }) }) }

func (p *proxy) close() {
	_ = p.listener.Close()
	p.reset()
}
