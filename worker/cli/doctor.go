package cli

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/worker/internal/doctor"
)

type doctorCmd struct {
	JSON      bool          `name:"json" help:"One JSON object a line, for each finding."`
	KillAfter time.Duration `placeholder:"60s" help:"How long after SIGTERM the platform ends the worker, to compare it with what stopping may take: on Render its maxShutdownDelaySeconds."`

	runSettings `embed:""`
	Groups      kong.Plugins `embed:""`
}

// Help says what the results mean.
func (*doctorCmd) Help() string {
	return `A line for each finding, with the way out behind it:

  ok       needs nobody
  warning  workers run, and something is not as it should be, or could not be looked at
  failure  a worker can't start, can't do its work, or may lose jobs

It reads the settings that run reads, and changes nothing. It exits with 1 if there is a
failure. A server that doesn't answer takes some seconds, and the other one is looked at
all the same.`
}

// Run examines what the worker stands on.
func (d *doctorCmd) Run(ctx context.Context, in *invocation) error {
	set, err := in.kinds()
	if err != nil {
		return err
	}
	cfg, f := d.read(in)
	if f.has("REDIS_URL") {
		cfg.RedisURL = ""
	}
	if f.has("DATABASE_URL") {
		cfg.Pool.URL = ""
	}
	if d.KillAfter < 0 {
		return argumentError(fmt.Sprintf("--kill-after: %s is less than 0s", d.KillAfter))
	}
	if len(f.list) == 0 {
		if err := cfg.Validate(); err != nil { // what isn't a setting
			return programFault("the program can't be run", err)
		}
	}
	in.process.logRedis(slog.New(slog.DiscardHandler))
	findings := doctor.Examine(ctx, doctor.Config{
		RedisURL: cfg.RedisURL, Pool: cfg.Pool, Faults: f.list, Doubts: d.doubts(in), Tasks: set,
		Queues: cfg.Queues, Concurrency: cfg.Concurrency, ShutdownTimeout: cfg.ShutdownTimeout, ValidateEvery: cfg.ValidateEvery,
		MaxPayload: cfg.MaxPayload, OutboundAllow: cfg.OutboundAllow, StopsWithin: cfg.StopsWithin(),
		Platform: doctor.PlatformOf(in.Env), KillAfter: d.KillAfter,
	})
	if err := in.printFindings(findings, d.JSON); err != nil {
		return err
	}
	failures, warnings := 0, 0
	for _, finding := range findings {
		switch finding.Result {
		case doctor.Failure:
			failures++
		case doctor.Warning:
			warnings++
		}
	}
	if failures > 0 {
		return fmt.Errorf("failures: %d, warnings: %d", failures, warnings)
	}
	return nil
}

// doubts are what the values of the settings don't tell.
func (d *doctorCmd) doubts(in *invocation) []string {
	lines := in.misspelt()
	if d.Fetchers != "" {
		lines = append(lines, "WORKER_FETCHERS has no effect any more; remove it")
	}
	if in.Env("RENDER") != "" && d.LogFormat == "text" {
		lines = append(lines, "LOG_FORMAT is text: Render tells errors from the rest by the level in JSON; remove it")
	}
	return lines
}

func (in *invocation) printFindings(findings []doctor.Finding, asJSON bool) error {
	if asJSON {
		return printLines(in.stdout, findings)
	}
	paint := in.painter()
	colours := map[doctor.Result]colour{doctor.OK: normal, doctor.Warning: yellow, doctor.Failure: red}
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, f := range findings {
		says := oneLine(f.Says)
		if f.WayOut != "" {
			says += " → " + oneLine(f.WayOut)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", paint(colours[f.Result], string(f.Result)), f.Check, says)
	}
	_ = w.Flush() // a buffer takes everything
	_, err := in.stdout.Write(text.Bytes())
	return err
}
