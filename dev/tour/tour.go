package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/dev/data"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/csvimport"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/webhook"
)

// errJobFailed says that a job of the tour did not succeed.
var errJobFailed = errors.New("a job of the tour failed")

// tour is a walk through what carpool does, with one job a step.
type tour struct {
	stack     *stack
	out       io.Writer
	client    *tasks.Client
	inspector *asynq.Inspector
}

// giveTour takes every step, also those after one that failed, and returns what failed. A tour that is cut short fails.
func giveTour(ctx context.Context, s *stack, out io.Writer) error {
	rdb, err := tasks.OpenRedis(s.redisURL)
	if err != nil {
		return err
	}
	defer rdb.Close()
	t := &tour{stack: s, out: out, client: tasks.NewClient(rdb), inspector: asynq.NewInspectorFromRedisClient(rdb)}
	// Without the worker no job would ever end.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-s.worker.Done():
			cancel(fmt.Errorf("the worker has ended: %w", s.worker.Err()))
		case <-ctx.Done():
		}
	}()

	steps := []struct {
		title string
		take  func(context.Context) error
	}{
		{"A CSV file into Postgres, enqueued from Go", t.importFromGo},
		{"The same from the command line", t.importFromCommandLine},
		{"A signed webhook", t.deliverWebhook},
		{"The pool is validated, as it is all the time", t.validatePool},
	}
	var failed []error
	for i, step := range steps {
		fmt.Fprintf(t.out, "\n%d. %s\n", i+1, step.title)
		stepCtx, cancel := context.WithTimeoutCause(ctx, giveUpAfter, fmt.Errorf("gave up after %s", giveUpAfter))
		err := step.take(stepCtx)
		cancel()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			fmt.Fprintf(t.out, "   FAILED: %v\n", err)
			failed = append(failed, fmt.Errorf("%w: step %d: %w", errJobFailed, i+1, err))
		}
	}
	return errors.Join(failed...)
}

func (t *tour) importFromGo(ctx context.Context) error {
	t.say(`csvimport.Import{Source: "file:///seattle-weather.csv", Table: "seattle_weather", Mode: "replace"}`)
	err := t.enqueue(ctx, csvimport.Import{Source: "file:///seattle-weather.csv", Table: "seattle_weather", Mode: "replace"})
	if err != nil {
		return err
	}
	return t.lookAtImport(ctx, "seattle_weather")
}

func (t *tour) importFromCommandLine(ctx context.Context) error {
	payload := `{"source": "file:///seattle-weather.csv", "table": "seattle_weather_again", "mode": "replace"}`
	t.say("$ worker enqueue csv:import %s --max-retry 0 --wait", quoted(payload))
	cmd := exec.Command(t.stack.program(), "enqueue", "csv:import", payload, "--max-retry", "0", "--wait")
	cmd.Env = t.stack.environ()
	var printed bytes.Buffer
	runErr := runToEnd(ctx, cmd, io.MultiWriter(&printed, &indent{out: t.out}))
	id, _, _ := strings.Cut(printed.String(), "\n")
	if id == "" || strings.Contains(id, " ") { // it is a message
		return fmt.Errorf("worker enqueue printed no job's id: %w", runErr)
	}
	// The record says more than the exit code.
	if err := t.showRecord(ctx, id); err != nil {
		return err
	}
	if runErr != nil {
		return fmt.Errorf("worker enqueue: %w", runErr)
	}
	return t.lookAtImport(ctx, "seattle_weather_again")
}

// lookAtImport asks Postgres what the import brought.
func (t *tour) lookAtImport(ctx context.Context, table string) error {
	conn, err := pgx.Connect(ctx, t.stack.databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var days, rain int
	var hottest time.Time
	var degrees float64
	err = conn.QueryRow(ctx, `
		SELECT count(*), count(*) FILTER (WHERE weather = 'rain'),
		       (array_agg(date ORDER BY temp_max DESC))[1], max(temp_max)
		FROM `+pgx.Identifier{"imports", table}.Sanitize()).Scan(&days, &rain, &hottest, &degrees)
	if err != nil {
		return fmt.Errorf("look at imports.%s: %w", table, err)
	}
	if want := bytes.Count(data.SeattleWeather, []byte("\n")) - 1; days != want {
		return fmt.Errorf("imports.%s has %d rows, the file %d", table, days, want)
	}
	t.say("in Postgres: imports.%s has %d days, %d of them of rain; the hottest was %s with %.1f °C",
		table, days, rain, hottest.Format(time.DateOnly), degrees)
	return nil
}

func (t *tour) deliverWebhook(ctx context.Context) error {
	t.say(`webhook.Deliver{URL: %q, Event: "weather.imported", …}`, t.stack.receiver.url)
	err := t.enqueue(ctx, webhook.Deliver{
		URL: t.stack.receiver.url, Event: "weather.imported", Body: json.RawMessage(`{"table":"seattle_weather"}`),
	})
	if err != nil {
		return err
	}
	select {
	case d := <-t.stack.receiver.received:
		t.say("the receiver checked the signature of webhook %s: it is right; %d bytes", d.id, len(d.body))
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the receiver has seen no webhook that is signed rightly: %w", context.Cause(ctx))
	}
}

// validatePool waits for a validation that the worker's scheduler enqueued on the queue of the worker's own.
func (t *tour) validatePool(ctx context.Context) error {
	t.say("the worker's scheduler enqueues pool:validate for itself; waiting for the next one …")
	since := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		info, err := t.validation(since)
		if err != nil {
			return err
		}
		if info != nil {
			t.say("on the queue %s: %s", info.Queue, info.Result)
			return t.showRecord(ctx, info.ID)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("no pool was validated: %w", context.Cause(ctx))
		}
	}
}

// validation finds a pool:validate that ended after since; nil if there is none yet.
func (t *tour) validation(since time.Time) (*asynq.TaskInfo, error) {
	queues, err := t.inspector.Queues()
	if err != nil {
		return nil, fmt.Errorf("list the queues: %w", err)
	}
	for _, queue := range queues {
		if !strings.HasPrefix(queue, "instance-") {
			continue
		}
		archived, err := t.inspector.ListArchivedTasks(queue)
		if err != nil {
			return nil, fmt.Errorf("look into queue %s: %w", queue, err)
		}
		if len(archived) > 0 {
			return nil, fmt.Errorf("pool:validate failed: %s", archived[0].LastErr)
		}
		completed, err := t.inspector.ListCompletedTasks(queue, asynq.PageSize(1000))
		if err != nil {
			return nil, fmt.Errorf("look into queue %s: %w", queue, err)
		}
		for _, info := range completed {
			// Redis keeps the end to the second.
			if info.Type == (maintenance.PoolValidate{}).Kind() && info.CompletedAt.After(since) {
				return info, nil
			}
		}
	}
	return nil, nil
}

// enqueue enqueues a job as any Go program would, and shows how it goes and what it did. It is not retried: the tour shows a
// failure at once.
func (t *tour) enqueue(ctx context.Context, p tasks.Payload) error {
	info, err := t.client.Enqueue(ctx, p, &tasks.EnqueueOptions{MaxRetry: tasks.NoRetry, Retention: time.Hour})
	if err != nil {
		return err
	}
	result, waitErr := t.client.Wait(ctx, info.Queue, info.ID, func(job *tasks.Info) {
		t.say("%s", strings.TrimSpace(fmt.Sprintf("… %s %s", job.State, job.Result)))
	})
	if len(result) > 0 {
		t.say("result: %s", result)
	}
	if waitErr != nil && ctx.Err() != nil {
		return waitErr
	}
	return errors.Join(waitErr, t.showRecord(ctx, info.ID))
}

// showRecord prints what the worker's record says of a job; one that did not succeed is an error.
func (t *tour) showRecord(ctx context.Context, id string) error {
	r, err := t.stack.log.recordOf(ctx, id)
	if err != nil {
		return err
	}
	t.say("%s", r)
	if r.Job.Outcome != "done" {
		return fmt.Errorf("job %s: %s", id, r.Job.Outcome)
	}
	return nil
}

func (t *tour) say(format string, args ...any) { fmt.Fprintf(t.out, "   "+format+"\n", args...) }

// indent sets off what another program prints.
type indent struct {
	out     io.Writer
	midLine bool
}

func (i *indent) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		if !i.midLine {
			line = "   | " + line
		}
		if _, err := io.WriteString(i.out, line); err != nil {
			return 0, err
		}
		i.midLine = !strings.HasSuffix(line, "\n")
	}
	return len(b), nil
}
