package doctor

import (
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/carpool-go/carpool/internal/startup"
)

// checkSettings judges the settings by themselves. What is wrong with one of them is in
// Faults already; here are those that don't go together.
func (e *examination) checkSettings() []Finding {
	r := &report{check: "settings"}
	for _, fault := range e.Faults {
		r.fail("", "%s", fault)
	}
	for _, doubt := range e.Doubts {
		r.warn("", "%s", doubt)
	}
	if len(e.Faults) > 0 {
		return r.findings
	}
	p := e.Pool
	if most := 2 * (e.Concurrency + 1); p.Size > most {
		r.warn("lower DB_POOL_SIZE: each connection that is kept open takes memory of the server's",
			"DB_POOL_SIZE is %d, more than two for each of the %s at once (WORKER_CONCURRENCY)", p.Size, plural(e.Concurrency, "job"))
	}
	if !p.PrePing {
		r.warn("set DB_POOL_PRE_PING=true", "DB_POOL_PRE_PING is false: that a connection has died is found by a job, which fails of it")
	}
	if p.Recycle > 0 && p.Recycle < e.ValidateEvery {
		r.warn("raise DB_POOL_RECYCLE, to 30m for example",
			"DB_POOL_RECYCLE is %s: connections are opened anew all the time", p.Recycle)
	}
	if p.Echo && e.Platform.Name != "" {
		r.warn("set DB_ECHO=false", "DB_ECHO logs each statement, several for each job")
	}
	if e.ShutdownTimeout <= 0 {
		r.warn("set WORKER_SHUTDOWN_TIMEOUT to what most of your jobs take at most, 25s for example",
			"WORKER_SHUTDOWN_TIMEOUT is 0s: each deploy interrupts the jobs that run, however short they are")
	}
	if open := openTo(e.OutboundAllow); open != "" {
		r.warn("list in OUTBOUND_ALLOW the hosts that your jobs call, and no more",
			"OUTBOUND_ALLOW has %s: whoever enqueues a job can have the worker call anything in its network", open)
	}
	return append(r.orOK("%s at once, a pool of %d + %d connections", plural(e.Concurrency, "job"), p.Size, p.MaxOverflow), e.checkShutdown()...)
}

// openTo returns the entry of OUTBOUND_ALLOW that takes all addresses, or most of them; ""
// if none does.
func openTo(allow string) string {
	const small = 8 // a network of fewer bits is larger than any private one
	for entry := range strings.SplitSeq(allow, ",") {
		if prefix, err := netip.ParsePrefix(strings.TrimSpace(entry)); err == nil && prefix.Bits() < small {
			return prefix.String()
		}
	}
	return ""
}

// checkShutdown compares the time that the worker may take to stop with what its platform
// gives it.
func (e *examination) checkShutdown() []Finding {
	r := &report{check: "shutdown"}
	p, needs := e.Platform, e.StopsWithin.Round(time.Second)
	lower := "lower WORKER_SHUTDOWN_TIMEOUT"
	const killed = "; jobs that are cut off run again only when their leases are over"
	switch {
	case e.KillAfter > 0 && e.KillAfter < needs:
		wayOut := "have the platform wait for " + needs.String()
		if p.Name != "" {
			wayOut = "set " + p.Setting + " to " + seconds(needs)
		}
		r.warn(wayOut+", or "+lower, "the worker may take %s to stop, and is killed after %s"+killed, needs, e.KillAfter)
	case p.Most > 0 && needs > p.Most:
		r.warn(lower+" to "+(e.ShutdownTimeout-(needs-p.Most)).String(), "the worker may take %s to stop, and %s waits for %s at most"+killed, needs, p.Name, p.Most)
	case e.KillAfter == 0 && p.Name != "" && needs > p.Default:
		r.warn("set "+p.Setting+" to "+seconds(needs)+" or more, and tell doctor what it is by --kill-after; or "+lower,
			"the worker may take %s to stop, and %s waits for %s unless %s says otherwise"+killed, needs, p.Name, p.Default, p.Setting)
	}
	if e.KillAfter > 0 {
		return r.orOK("after SIGTERM jobs have %s, and the worker has ended after %s at most, of %s", max(0, e.ShutdownTimeout), needs, e.KillAfter)
	}
	return r.orOK("after SIGTERM jobs have %s, and the worker has ended after %s at most", max(0, e.ShutdownTimeout), needs)
}

// seconds is a duration as a number of whole seconds, which platforms are told.
func seconds(d time.Duration) string { return strconv.Itoa(int(d.Seconds())) }

// explain is an error of a server's in the words that the commands have for it.
func explain(variable, url string, err error) string {
	explained, _ := startup.Explain(variable, url, err)
	return explained.Error()
}
