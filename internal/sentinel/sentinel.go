// Package sentinel leads a client to the Redis that Sentinels name as the master.
//
// It takes the place of go-redis' own failover client, which keeps to the Sentinel that has
// answered first: when that one is frozen, or its machine is gone, a client whose master has
// changed finds the new one only after the Sentinel is back. Here each new connection asks
// anew.
package sentinel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/carpool-go/carpool/internal/wait"
)

const (
	// patience bounds the making of one connection: the search for the master and the dialling.
	// It is less than what checks and commands wait, so that they say why there is none.
	patience = 3 * time.Second
	// pause is how long a Sentinel that can't be reached, and a master that isn't there, are
	// given before they are tried again.
	pause = 250 * time.Millisecond
	// headStart is what a Sentinel has to answer before the next is asked too.
	headStart = 250 * time.Millisecond
)

// NewClient returns a client of the master that the Sentinels of o name; Addrs are theirs.
// It asks them for each new connection. An answer of READONLY costs a connection its place in
// the client's pool, so that a master that has become a replica is left.
func NewClient(o *redis.UniversalOptions) *redis.Client {
	opts := o.Simple()
	opts.DialTimeout = patience
	opts.DialerRetries = 1 // dial itself tries again, as long as it may
	d := &dialer{options: o, toMaster: redis.NewDialer(opts)}
	asDialed := *opts
	asDialed.Dialer = d.dial
	return redis.NewClient(&asDialed)
}

// dialer makes connections to the master.
type dialer struct {
	options  *redis.UniversalOptions
	toMaster func(ctx context.Context, network, addr string) (net.Conn, error)
}

// dial connects to the master. While there is a failover the Sentinels still name the old one,
// so it asks them again when that can't be reached.
func (d *dialer) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var failed error
	for {
		addr, err := d.find(ctx)
		if err == nil {
			var conn net.Conn
			if conn, err = d.toMaster(ctx, network, addr); err == nil {
				return conn, nil
			}
		}
		if failed == nil || ctx.Err() == nil {
			failed = err
		}
		if _, searched := errors.AsType[*Error](err); searched || isOfCertificates(err) || wait.For(ctx, pause) != nil {
			return nil, failed
		}
	}
}

// find returns the address that the first answer names. The Sentinels are asked in turn, in
// random order, and each one while those before it are still waited for.
func (d *dialer) find(ctx context.Context) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		of     int
		master string
		err    error
	}
	answers := make(chan answer, len(d.options.Addrs))
	for turn, i := range rand.Perm(len(d.options.Addrs)) {
		go func() {
			a := answer{of: i}
			if a.err = wait.For(ctx, time.Duration(turn)*headStart); a.err == nil {
				a.master, a.err = d.ask(ctx, d.options.Addrs[i])
			}
			answers <- a
		}()
	}
	errs := make([]error, len(d.options.Addrs))
	for range errs {
		a := <-answers
		if a.err == nil {
			return a.master, nil
		}
		errs[a.of] = a.err
	}
	return "", &Error{Addrs: d.options.Addrs, Master: d.options.MasterName, Errs: errs}
}

// ask asks one Sentinel until it answers or ctx ends. The error is an answer's, or says why
// there is none.
func (d *dialer) ask(ctx context.Context, addr string) (master string, err error) {
	client := redis.NewSentinelClient(&redis.Options{
		Addr: addr, Username: d.options.SentinelUsername, Password: d.options.SentinelPassword,
		TLSConfig: d.options.TLSConfig, DialTimeout: patience, ContextTimeoutEnabled: true,
		MaxRetries: -1, DialerRetries: 1, PoolSize: 1,
		DisableIdentity: true, MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	defer client.Close()
	var failed error
	for {
		named, err := client.GetMasterAddrByName(ctx, d.options.MasterName).Result()
		if err == nil && len(named) == 2 {
			return net.JoinHostPort(named[0], named[1]), nil
		}
		if _, answered := errors.AsType[redis.Error](err); answered || isOfCertificates(err) {
			return "", err
		}
		if failed == nil || ctx.Err() == nil {
			failed = err
		}
		if wait.For(ctx, pause) != nil {
			return "", failed
		}
	}
}

// isOfCertificates reports whether TLS has failed by a certificate, the server's or the
// client's, which another attempt finds as it is.
func isOfCertificates(err error) bool {
	_, ofServer := errors.AsType[*tls.CertificateVerificationError](err)
	e, ok := errors.AsType[*net.OpError](err)
	return ofServer || ok && e.Op == "remote error" && strings.Contains(e.Err.Error(), "certificate") // an alert of TLS
}

// Error says that no Sentinel has named the master, and what to do. It wraps the answers of
// those that have answered, and no other cause: a client of Redis takes a lost connection for
// a reason to try at once again.
type Error struct {
	// Addrs are the Sentinels'.
	Addrs []string
	// Master is the name that they were asked for.
	Master string
	// Errs say why each gave no answer, or what it answered, in the order of Addrs.
	Errs []error
}

// Error implements error. It has no secret.
func (e *Error) Error() string {
	at := strings.Join(e.Addrs, ", ")
	if errors.Is(e, redis.Nil) {
		return fmt.Sprintf("the Sentinels at %s know no master %q; the URL's ?master= must be the name in their configuration", at, e.Master)
	}
	reasons := make([]string, len(e.Errs))
	for i, err := range e.Errs {
		reasons[i] = reason(err)
	}
	if all := slices.Compact(slices.Clone(reasons)); len(all) == 1 {
		reasons = all
	} else {
		for i := range reasons {
			reasons[i] = e.Addrs[i] + ": " + reasons[i]
		}
	}
	return fmt.Sprintf("Redis cannot be reached by the Sentinels at %s: %s; one of them must run and be reachable from here", at, strings.Join(reasons, "; "))
}

// Unwrap returns the answers that are errors.
func (e *Error) Unwrap() []error {
	var answers []error
	for _, err := range e.Errs {
		if answer, ok := errors.AsType[redis.Error](err); ok {
			answers = append(answers, answer)
		}
	}
	return answers
}

// reason says in few words why a Sentinel gives no answer. The address is left out.
func reason(err error) string {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return "no answer"
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		err = e.Err
	}
	return err.Error()
}
