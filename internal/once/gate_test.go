package once

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// gate stands between a run and Postgres, and holds each message of the protocol, in both
// directions, until it is let through. What opens a connection, or cancels, isn't held.
type gate struct {
	listener net.Listener
	target   string
	work     sync.WaitGroup

	mu      sync.Mutex // guards what follows
	changed *sync.Cond
	open    bool // nothing is held
	pass    int  // how many messages may go on
	gone    bool // the run's process: it is not heard any more
	deaf    bool // the next answer cuts its connection in place of reaching the run
	links   map[*gatedLink]struct{}
}

type gatedLink struct {
	client, server *net.TCPConn
	ready          bool // it is open; of gate.mu
	cut            bool // of gate.mu
}

func newGate(t testing.TB, target string) *gate {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{listener: l, target: target, open: true, links: map[*gatedLink]struct{}{}}
	g.changed = sync.NewCond(&g.mu)
	g.work.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			g.work.Go(func() { g.serve(client.(*net.TCPConn)) })
		}
	})
	return g
}

func (g *gate) addr() string { return g.listener.Addr().String() }

// set changes the gate.
func (g *gate) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	g.changed.Broadcast()
}

// step lets n messages through, and returns when they are, or no more come.
func (g *gate) step(n int, patience time.Duration) {
	g.set(func() { g.pass = n })
	for giveUp := time.Now().Add(patience); time.Now().Before(giveUp); time.Sleep(100 * time.Microsecond) {
		g.mu.Lock()
		left := g.pass
		g.mu.Unlock()
		if left == 0 {
			break
		}
	}
	g.set(func() { g.pass = 0 })
}

// reset cuts the run's connections. What is held is lost.
func (g *gate) reset() {
	g.set(func() {
		for l := range g.links {
			g.cutLocked(l)
		}
	})
}

func (g *gate) cutLocked(l *gatedLink) {
	l.cut = true
	for _, c := range []*net.TCPConn{l.client, l.server} {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// kill ends the run's process. What is on its way to the server then arrives still, unless
// it is lost.
func (g *gate) kill(lost bool) {
	g.set(func() {
		g.gone = true
		for l := range g.links {
			_ = l.client.Close()
			if lost {
				g.cutLocked(l)
			}
		}
	})
}

// close returns once all connections are closed.
func (g *gate) close() {
	_ = g.listener.Close()
	g.work.Wait()
}

func (g *gate) serve(client *net.TCPConn) {
	defer client.Close()
	conn, err := net.Dial("tcp", g.target)
	if err != nil {
		return
	}
	l := &gatedLink{client: client, server: conn.(*net.TCPConn)}
	defer l.server.Close()
	gone := false
	g.set(func() {
		gone = g.gone
		g.links[l] = struct{}{}
	})
	defer g.set(func() { delete(g.links, l) })
	if gone {
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		in := bufio.NewReader(client)
		for first := true; ; first = false {
			kind := 1
			if first { // what opens a connection has no type
				kind = 0
			}
			message, err := readMessage(in, kind)
			if err != nil || !g.let(l, false) {
				break
			}
			if _, err := l.server.Write(message); err != nil {
				break
			}
		}
		_ = l.server.CloseWrite()
	})
	both.Go(func() {
		in := bufio.NewReader(l.server)
		for {
			message, err := readMessage(in, 1)
			if err != nil || !g.let(l, true) {
				break
			}
			_, _ = client.Write(message) // a client that is gone doesn't keep the server from going on
			if message[0] == 'Z' {
				g.set(func() { l.ready = true })
			}
		}
		_ = client.Close()
	})
	both.Wait()
}

func readMessage(in *bufio.Reader, kind int) ([]byte, error) {
	head := make([]byte, kind+4)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, err
	}
	message := append(head, make([]byte, binary.BigEndian.Uint32(head[kind:])-4)...)
	_, err := io.ReadFull(in, message[kind+4:])
	return message, err
}

// let waits until a message may go on. It returns false if it is lost.
func (g *gate) let(l *gatedLink, answer bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for l.ready && !l.cut && !g.open && g.pass == 0 {
		g.changed.Wait()
	}
	if l.cut {
		return false
	}
	if l.ready {
		g.pass = max(0, g.pass-1)
	}
	if l.ready && answer && g.deaf {
		g.deaf = false
		_ = l.client.SetLinger(0)
		_ = l.client.Close()
	}
	return true
}
