package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/carpool-go/carpool/monitor"
)

type healthCmd struct {
	Live       bool `help:"Ask whether the worker is alive, which it is too while a server is away: for a platform that restarts what is unhealthy."`
	AskMonitor bool `name:"monitor" help:"Ask the monitor at MONITOR_ADDR, not a worker."`

	healthSettings `embed:""`
	monitorAddress `embed:""`
}

const (
	// healthTimeout is how long the answer is waited for. A worker takes two seconds at most.
	healthTimeout = 5 * time.Second
	// maxHealth is how much of an answer is read.
	maxHealth = 64 << 10
)

// Run asks, and prints a line. Every fault is an exit code of 1, also one of the settings,
// because a container's health check has no other.
func (c *healthCmd) Run(ctx context.Context, in *invocation) error {
	url, err := c.url(in)
	if err != nil {
		return err
	}
	status, body, err := askHealth(ctx, url)
	if err != nil {
		return err
	}
	if c.AskMonitor {
		if status != http.StatusOK || strings.TrimSpace(body) != "ok" {
			return fmt.Errorf("%s answers with the status %d, which is no monitor's: is another program there?", url, status)
		}
		_, err = fmt.Fprintln(in.stdout, "ok")
		return err
	}
	var report struct {
		OK      *bool
		Message string
		Checks  []struct {
			Name, Message string
			OK            bool
		}
	}
	if err := json.Unmarshal([]byte(body), &report); err != nil || report.OK == nil {
		return fmt.Errorf("%s answers with the status %d, and not as a worker does: is another program there?", url, status)
	}
	if *report.OK {
		_, err = fmt.Fprintln(in.stdout, oneLine(report.Message))
		return err
	}
	why := report.Message
	separator := ": "
	for _, check := range report.Checks {
		if !check.OK {
			why += separator + check.Name + ": " + check.Message
			separator = "; "
		}
	}
	return errors.New(oneLine(why))
}

// url is what is asked.
func (c *healthCmd) url(in *invocation) (string, error) {
	f := in.faults()
	path := "/readyz?format=json"
	variable, addr, example := "HEALTH_ADDR", c.HealthAddr, exampleHealthAddr
	switch {
	case c.AskMonitor && c.Live:
		return "", argumentError("--live and --monitor: the monitor knows only whether it is alive; leave --live out")
	case c.AskMonitor:
		variable, addr, example, path = "MONITOR_ADDR", c.Addr, "127.0.0.1:8080", monitor.HealthPath
	case c.Live:
		path = "/livez?format=json"
	}
	if addr == "" {
		return "", errors.New("HEALTH_ADDR is not set, so no worker says whether it is well; set it for the worker and for this command, for example HEALTH_ADDR=" + example)
	}
	f.hostPort(variable, addr, example)
	if len(f.list) > 0 {
		return "", errors.New(f.list[0])
	}
	return "http://" + reachable(addr) + path, nil
}

// reachable is the address at which a server is asked that listens on addr: one that
// listens everywhere is asked on this machine.
func reachable(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	switch ip := net.ParseIP(host); {
	case host == "" || ip.Equal(net.IPv4zero):
		host = "127.0.0.1"
	case ip.Equal(net.IPv6unspecified):
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}

// askHealth asks this machine, without a proxy.
func askHealth(ctx context.Context, url string) (status int, body string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, healthTimeout, fmt.Errorf("no answer within %s", healthTimeout))
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	transport := &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: maxHealth}
	response, err := transport.RoundTrip(request)
	if err == nil {
		defer response.Body.Close()
		var data []byte
		data, err = io.ReadAll(io.LimitReader(response.Body, maxHealth))
		body = string(data)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, "", fmt.Errorf("%s: %w", url, context.Cause(ctx))
	case err != nil:
		return 0, "", fmt.Errorf("%s: nobody answers there: %w", url, err)
	}
	return response.StatusCode, body, nil
}
