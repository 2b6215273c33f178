package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"runtime"
	"sync"
	"time"
)

// delayLine is a TCP proxy that holds back what goes through it, as a longer cable does:
// each direction takes half of the delay, and as much may be under way as there is.
//
// All connections share one queue for each direction. As everything is held back for as
// long, what came first is due first; and one goroutine that sleeps in the kernel is
// more exact than timers, which the Go runtime rounds up to whole milliseconds.
type delayLine struct {
	url      string
	target   string
	half     time.Duration
	listener net.Listener
	out, in  chan parcel // to the server, to the client

	mu    sync.Mutex
	conns []net.Conn
}

// parcel is what was read at once; without bytes, the end of it.
type parcel struct {
	to    net.Conn
	bytes []byte
	due   time.Time
}

// newDelayLine starts one to the server of a URL; its own url leads through it.
func newDelayLine(to string, delay time.Duration) (*delayLine, error) {
	u, err := url.Parse(to)
	if err != nil {
		return nil, errors.New("delay: the server's URL is no URL")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("delay: %w", err)
	}
	d := &delayLine{
		target: u.Host, half: delay / 2, listener: listener,
		out: make(chan parcel, 1<<16), in: make(chan parcel, 1<<16),
	}
	u.Host = listener.Addr().String()
	d.url = u.String()
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), runtime.NumCPU()+2)) // two sleep in the kernel
	go d.accept()
	go deliver(d.out)
	go deliver(d.in)
	return d, nil
}

func (d *delayLine) accept() {
	for {
		client, err := d.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", d.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		d.mu.Lock()
		d.conns = append(d.conns, client, server)
		d.mu.Unlock()
		go d.read(client, server, d.out)
		go d.read(server, client, d.in)
	}
}

func (d *delayLine) read(from, to net.Conn, line chan<- parcel) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			line <- parcel{to, append([]byte(nil), buf[:n]...), time.Now().Add(d.half)}
		}
		if err != nil {
			line <- parcel{to, nil, time.Now().Add(d.half)}
			return
		}
	}
}

// deliver writes what comes when it is due. It ends with the process.
func deliver(line <-chan parcel) {
	runtime.LockOSThread()
	for p := range line {
		if wait := time.Until(p.due); wait > 0 {
			sleep(wait)
		}
		if p.bytes == nil {
			_ = p.to.Close()
			continue
		}
		_, _ = p.to.Write(p.bytes) // if the other side is gone, its reader has said so
	}
}

// close ends the connections, and takes no more.
func (d *delayLine) close() {
	_ = d.listener.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		_ = c.Close()
	}
}
