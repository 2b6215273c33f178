package testservers

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// giveUp bounds waits that end at once unless something is broken.
const giveUp = 30 * time.Second

func TestProxy_PassesBytesBothWaysAndTheEnd(t *testing.T) {
	t.Parallel()
	_, conn := echoThroughProxy(t)
	say(t, conn, "hello\n")
	hear(t, conn, "hello\n")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(conn); err != nil || len(rest) > 0 {
		t.Fatalf("after the end: %q, %v; want the end passed on", rest, err)
	}
}

func TestProxy_BlackholeSwallowsBytesAndKeepsConnectionsOpen(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	p.Blackhole()
	say(t, conn, "lost\n")
	hearNothing(t, conn)
	p.Heal()
	say(t, conn, "heard\n")
	hear(t, conn, "heard\n")
}

func TestProxy_BlackholeKeepsACloseFromTheOtherSide(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	say(t, conn, "hello\n")
	hear(t, conn, "hello\n")
	p.Blackhole()
	_ = conn.Close()
	time.Sleep(20 * time.Millisecond) // only to give a close that is wrongly passed on the time to be so
	if n := p.Connections(); n != 1 {
		t.Errorf("%d connections, want the one that the server has not seen close", n)
	}
	p.Heal()
	Eventually(t, "the close is passed on after Heal", func() bool { return p.Connections() == 0 })
}

func TestProxy_DropAnswersPassesOnWhatIsSaidToTheServerAndCutsTheConnectionInTheEnd(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	say(t, conn, "before\n")
	hear(t, conn, "before\n")
	p.DropAnswers()
	say(t, conn, "lost\n")
	hearNothing(t, conn)
	p.Heal()
	_ = conn.SetReadDeadline(time.Now().Add(giveUp))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset, since an answer is missing", err)
	}
	again := dial(t, p)
	say(t, again, "hello\n")
	hear(t, again, "hello\n")
}

func TestProxy_ResetCutsOpenConnectionsAndServesNewOnes(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	say(t, conn, "hello\n")
	hear(t, conn, "hello\n")
	p.Reset()
	_ = conn.SetReadDeadline(time.Now().Add(giveUp))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v, want a reset", err)
	}
	again := dial(t, p)
	say(t, again, "hello\n")
	hear(t, again, "hello\n")
}

func TestProxy_RefuseTurnsNewConnectionsAwayUntilHealed(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	say(t, conn, "before\n")
	hear(t, conn, "before\n")
	p.Refuse()
	if c, err := net.Dial("tcp", p.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, %v; want refused", c, err)
	}
	say(t, conn, "still\n")
	hear(t, conn, "still\n")
	p.Heal()
	say(t, dial(t, p), "hello\n")
}

func TestProxy_DelayIsAddedToEachDirection(t *testing.T) {
	t.Parallel()
	p, conn := echoThroughProxy(t)
	p.Delay(20 * time.Millisecond)
	start := time.Now()
	say(t, conn, "hello\n")
	hear(t, conn, "hello\n")
	if took := time.Since(start); took < 40*time.Millisecond {
		t.Errorf("a round trip took %v, want 40ms at least", took)
	}
}

// echoThroughProxy starts a server that sends back what it gets, a proxy to it, and a connection through that.
func echoThroughProxy(t *testing.T) (*Proxy, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	p := NewProxy(t, l.Addr().String())
	return p, dial(t, p)
}

func dial(t *testing.T, p *Proxy) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn)
}

func say(t *testing.T, c net.Conn, what string) {
	t.Helper()
	if _, err := io.WriteString(c, what); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c net.Conn, want string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(giveUp))
	got, err := bufio.NewReader(c).ReadString('\n')
	if err != nil || got != want {
		t.Fatalf("heard %q, %v; want %q", got, err, want)
	}
}

func hearNothing(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("heard %d bytes, %v; want nothing", n, err)
	}
}
