package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/instance"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/scheduler"
	"github.com/carpool-go/carpool/tasks"
)

type enqueueCmd struct {
	Kind    string `arg:"" help:"The kind of job; see: ${name} kinds."`
	Payload string `arg:"" name:"json" help:"The payload as JSON, or - to read it from standard input, where the list of processes doesn't show it."`

	Queue     string        `help:"Queue to put it on, instead of the kind's own."`
	In        time.Duration `xor:"when" placeholder:"5m" help:"Run it after this time."`
	At        time.Time     `xor:"when" placeholder:"2026-01-31T08:00:00Z" help:"Run it at this time."`
	Unique    string        `placeholder:"KEY" help:"Only if no job of the kind with this key is unfinished; else print that one's id."`
	MaxRetry  *int          `placeholder:"N" help:"Tries after the first one fails, instead of the kind's own; 0 for none."`
	Timeout   time.Duration `placeholder:"10m" help:"Bound on each try, instead of the kind's own."`
	Retention time.Duration `placeholder:"24h" help:"How long it stays in sight when it is done, instead of the kind's own."`
	Wait      bool          `help:"Wait for its end and print its result; exit with 1 if it failed."`

	redisSettings   `embed:""`
	payloadSettings `embed:""`
}

// retentionForWait keeps a job that is waited for in sight until its result has
// been read.
const retentionForWait = 5 * time.Minute

// Run enqueues the job, and waits for its end if it is to.
func (e *enqueueCmd) Run(ctx context.Context, in *invocation) error {
	payload, most, err := in.readPayload(ctx, e.Kind, e.Payload, e.payloadSettings, in.exampleLine)
	if err != nil {
		return err
	}
	opts, err := e.options(payload.Options())
	if err != nil {
		return err
	}
	return in.withRedis(e.redisSettings, func(rdb redis.UniversalClient) error {
		client := tasks.NewClient(rdb)
		client.MaxPayload = most
		return e.enqueue(ctx, in, rdb, client, payload, opts)
	})
}

func (e *enqueueCmd) enqueue(ctx context.Context, in *invocation, rdb redis.UniversalClient, client *tasks.Client, payload tasks.Payload, opts *tasks.EnqueueOptions) error {
	var id, queue string
	info, err := client.Enqueue(ctx, payload, opts)
	if dup, ok := errors.AsType[*tasks.DuplicateError](err); ok {
		id, queue = dup.ID, dup.Queue
		fmt.Fprintf(in.stderr, "nothing was enqueued: this job holds the unique key %q\n", dup.Key)
	} else if err != nil {
		return err
	} else {
		id, queue = info.ID, info.Queue
	}
	fmt.Fprintln(in.stdout, id)
	in.warnOfQueue(ctx, admin.New(rdb, nil), queue)
	if !e.Wait {
		return nil
	}
	shown := in.newProgress()
	result, err := client.Wait(ctx, queue, id, shown.show)
	shown.end()
	if err != nil {
		return err
	}
	if result != nil {
		fmt.Fprintf(in.stdout, "%s\n", result)
	}
	return nil
}

// readPayload reads a command's payload of a kind from its argument, or for "-" from
// stdin, and returns how many bytes one may have too. example shows what would be right.
func (in *invocation) readPayload(ctx context.Context, kind, arg string, s payloadSettings, example func(*tasks.Task) string) (payload tasks.Payload, most int, err error) {
	f := in.faults()
	most = f.maxPayload(s.MaxPayload)
	if err := f.err(); err != nil {
		return nil, 0, err
	}
	set, err := in.kinds()
	if err != nil {
		return nil, 0, err
	}
	task, err := lookup(set, kind)
	if err != nil {
		return nil, 0, err
	}
	data := []byte(arg)
	if arg == "-" {
		if data, err = in.readStdin(ctx, most); err != nil {
			return nil, 0, err
		}
	}
	if err := limit.Check(len(data), most); err != nil {
		return nil, 0, argumentError(fmt.Sprintf("%s payload: %v", task.Kind, err))
	}
	payload, err = task.Decode(data)
	if err != nil {
		return nil, 0, argumentError(fmt.Sprintf("%v; for example: %s", err, example(task)))
	}
	return payload, most, nil
}

// readStdin reads stdin until ctx ends, up to most bytes; more are an error. The read itself
// knows no context, so that it may go on after that, for as long as the process does.
func (in *invocation) readStdin(ctx context.Context, most int) ([]byte, error) {
	var data []byte
	read := make(chan error, 1)
	go func() {
		var err error
		data, err = io.ReadAll(io.LimitReader(in.stdin, int64(most)+1))
		read <- err
	}()
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case err := <-read:
		if err != nil {
			return nil, fmt.Errorf("read the payload from standard input: %w", err)
		}
		if len(data) > most {
			return nil, argumentError(fmt.Sprintf("what comes from standard input has more bytes than the limit of %d, which MAX_PAYLOAD sets", most))
		}
		return data, nil
	}
}

// maxRetryFlag is [tasks.Options.MaxRetry] for --max-retry, which is nil if it is not
// given.
func maxRetryFlag(n *int) (int, error) {
	switch {
	case n == nil:
		return 0, nil
	case *n < 0:
		return 0, argumentError(fmt.Sprintf("--max-retry: %d is less than 0, which is no retry", *n))
	case *n == 0:
		return tasks.NoRetry, nil
	}
	return *n, nil
}

func (e *enqueueCmd) options(kind tasks.Options) (*tasks.EnqueueOptions, error) {
	opts := &tasks.EnqueueOptions{Queue: e.Queue, RunAt: e.At, UniqueKey: e.Unique}
	if e.Queue != "" && !asynqwire.IsQueueName(e.Queue) {
		return nil, argumentError(fmt.Sprintf("--queue: %q is no queue's name: letters, digits, and _ . : -", e.Queue))
	}
	if err := instance.CheckQueue(e.Queue, e.Kind); err != nil {
		return nil, argumentError("--" + err.Error())
	}
	if e.In < 0 {
		return nil, argumentError(fmt.Sprintf("--in: %s has passed", e.In))
	}
	if e.In > 0 {
		opts.RunAt = time.Now().Add(e.In)
	}
	var err error
	if opts.MaxRetry, err = maxRetryFlag(e.MaxRetry); err != nil {
		return nil, err
	}
	if t := e.Timeout; t != 0 && (t < time.Second || t > scheduler.MaxTimeout) {
		return nil, argumentError(fmt.Sprintf("--timeout: %s is not from 1s to 30 days", t))
	}
	if r := e.Retention; r != 0 && (r < time.Second || r > scheduler.MaxRetention) {
		return nil, argumentError(fmt.Sprintf("--retention: %s is not from 1s to 366 days", r))
	}
	opts.Timeout, opts.Retention = e.Timeout, e.Retention
	if e.Wait {
		opts.Retention = max(cmp.Or(opts.Retention, kind.Retention), retentionForWait)
	}
	return opts, nil
}
