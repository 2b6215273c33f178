package servers

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
)

// FreePort finds a port on 127.0.0.1 that nobody listens on. It stays below 32768, from where Linux (49152: others) hands
// out ports for outgoing connections, so that none of those takes it while a server restarts. Another server may still take
// it before the caller's does: callers try again.
func FreePort() (int, error) {
	const low, high = 15000, 32000
	var err error
	for range 100 {
		port := low + rand.IntN(high-low)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("find a free port: %w", err)
}

// errPortTaken says that somebody else listens on the port a server was to have.
var errPortTaken = errors.New("the port is taken")

// portTaken marks err as errPortTaken if the server said sign, its words for it.
func portTaken(err error, port int, sign string) error {
	if errors.Is(err, errEnded) && strings.Contains(err.Error(), sign) {
		return fmt.Errorf("port %d: %w: %w", port, errPortTaken, err)
	}
	return err
}

// onSomePort starts a server on the port wanted; 0: on a free one, and on another if somebody was quicker.
func onSomePort(wanted int, start func(port int) error) error {
	if wanted != 0 {
		return start(wanted)
	}
	const tries = 10
	var err error
	for range tries {
		var port int
		if port, err = FreePort(); err != nil {
			return err
		}
		if err = start(port); !errors.Is(err, errPortTaken) {
			return err
		}
	}
	return err
}
