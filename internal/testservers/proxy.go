package testservers

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
)

// Proxy is a TCP proxy that breaks on command. It stands between a client and its server and passes bytes on until told
// otherwise. A client whose server cannot be reached is cut off with RST.
type Proxy struct {
	t      testing.TB
	target string
	addr   string
	ctx    context.Context // ends with the test
	work   sync.WaitGroup

	mu       sync.Mutex // guards what follows
	listener net.Listener
	links    map[*link]struct{}
	hole     chan struct{} // bytes vanish until it is closed; nil: they do not
	delay    time.Duration // in each direction
	dropping bool          // what the target says vanishes
}

// NewProxy starts a proxy to target ("127.0.0.1:5432") on a free port. It ends with the test.
func NewProxy(t testing.TB, target string) *Proxy {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{t: t, target: target, ctx: ctx, links: map[*link]struct{}{}}
	t.Cleanup(func() {
		cancel()
		p.Refuse()
		p.Reset()
		p.work.Wait()
	})
	// Not port 0: Heal needs the port again, and the kernel may have given one of those to somebody's outgoing connection.
	var err error
	for range 10 {
		var port int
		if port, err = servers.FreePort(); err != nil {
			break
		}
		p.addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if err = p.listen(); err == nil {
			return p
		}
	}
	t.Fatalf("proxy: %v", err)
	return nil
}

// Addr is where clients find the proxy: "127.0.0.1:PORT". It stays the same all its life.
func (p *Proxy) Addr() string { return p.addr }

// Blackhole lets bytes vanish both ways, as a cut cable does: connections stay open, new ones are taken, nothing is said,
// and when one side closes the other does not hear of it. Heal ends it; what vanished stays lost, and a close that was
// kept back is then passed on.
func (p *Proxy) Blackhole() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hole == nil {
		p.hole = make(chan struct{})
	}
}

// DropAnswers lets vanish what the target says, while it hears its clients. Heal ends it, and cuts the connections that
// have missed something: TCP has no gaps.
func (p *Proxy) DropAnswers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropping = true
}

// Reset cuts every open connection with RST, at both ends. New ones are served.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.reset()
	}
}

// Refuse stops listening: new connections are refused, open ones go on.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
}

// Delay holds back what is sent for d in each direction, so that a round trip takes 2d longer. Throughput is not limited.
// 0 ends it.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

// Heal ends Blackhole, DropAnswers, Refuse and Delay.
func (p *Proxy) Heal() {
	p.t.Helper()
	p.mu.Lock()
	for l := range p.links {
		if l.missed {
			l.reset()
		}
	}
	p.dropping = false
	if p.hole != nil {
		close(p.hole)
		p.hole = nil
	}
	p.delay = 0
	refused := p.listener == nil
	p.mu.Unlock()
	if !refused {
		return
	}
	if err := p.listen(); err != nil {
		p.t.Errorf("proxy: heal: %v", err)
	}
}

// Connections is how many clients are connected.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

func (p *Proxy) listen() error {
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.listener = l
	p.mu.Unlock()
	p.work.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return // refused
			}
			p.work.Go(func() { p.serve(client) })
		}
	})
	return nil
}

// serve connects a client to the target and returns when both directions have ended.
func (p *Proxy) serve(client net.Conn) {
	server, err := (&net.Dialer{}).DialContext(p.ctx, "tcp", p.target)
	if err != nil {
		reset(client)
		return
	}
	l := &link{client: client, server: server, cut: make(chan struct{})}
	p.mu.Lock()
	p.links[l] = struct{}{}
	if p.ctx.Err() != nil {
		l.reset() // it came too late for the last Reset
	}
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.pass(l, l.server, l.client) })
	both.Go(func() { p.pass(l, l.client, l.server) })
	both.Wait()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
	_ = client.Close()
	_ = server.Close()
}

// chunk is what was read at once, and when it may be written.
type chunk struct {
	bytes []byte
	due   time.Time
}

// pass carries bytes from one side of a link to the other until one of them ends.
func (p *Proxy) pass(l *link, to, from net.Conn) {
	chunks := make(chan chunk, 1024)
	var writer sync.WaitGroup
	writer.Go(func() {
		for c := range chunks {
			l.waitUntil(c.due)
			if hole, _ := p.fault(); hole == nil && !p.drops(l, to) {
				_, _ = to.Write(c.bytes) // if to is gone, from will soon hear of it from the other direction
			}
		}
	})
	buffer := make([]byte, 64<<10)
	var err error
	for err == nil {
		var n int
		n, err = from.Read(buffer)
		if hole, delay := p.fault(); n > 0 && hole == nil {
			chunks <- chunk{bytes: append([]byte(nil), buffer[:n]...), due: time.Now().Add(delay)}
		}
	}
	close(chunks)
	writer.Wait()
	if hole, _ := p.fault(); hole != nil {
		select {
		case <-hole:
		case <-l.cut:
		}
	}
	if errors.Is(err, io.EOF) {
		closeWrite(to)
	} else {
		l.reset()
	}
}

func (p *Proxy) fault() (hole <-chan struct{}, delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hole, p.delay
}

// drops reports whether what is said to one side of a link vanishes, and notes that it has.
func (p *Proxy) drops(l *link, to net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dropping || to != l.client {
		return false
	}
	l.missed = true
	return true
}

// link is one client's connection and the one made for it to the target.
type link struct {
	client, server net.Conn
	once           sync.Once
	cut            chan struct{} // closed by reset
	missed         bool          // of Proxy.mu: something that the target said has vanished
}

func (l *link) reset() {
	l.once.Do(func() {
		close(l.cut)
		reset(l.client)
		reset(l.server)
	})
}

// waitUntil waits until t, or until the link is cut.
func (l *link) waitUntil(t time.Time) {
	wait := time.Until(t)
	if wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.cut:
	}
}

// reset closes a connection with RST in place of FIN.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// closeWrite says that no more comes, while the other direction goes on.
func closeWrite(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.CloseWrite()
	}
}
