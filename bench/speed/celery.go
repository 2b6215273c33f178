package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/carpool-go/carpool/internal/servers"
)

// celeryApp goes into the program, because a build of it may be run from another tree.
//
//go:embed celery_app.py
var celeryApp string

// celeryPrefetch is how many messages a worker may hold. The docs advise many for short jobs,
// and with threads Celery learns of an acknowledgement only when it wakes up, up to a second
// later: what it holds must last until then.
const celeryPrefetch = 1200

// celeryCommand is the app, which is told the servers by its environment: their URLs have
// passwords.
func celeryCommand(s spec, redisURL string, args ...string) *exec.Cmd {
	cmd := exec.Command(servers.CeleryPython, append([]string{"-c", celeryApp}, args...)...)
	cmd.Env = append(os.Environ(), "REDIS_URL="+redisURL, "DATABASE_URL="+s.DatabaseURL, "POOL_SIZE="+strconv.Itoa(s.PoolSize))
	return cmd
}

func produceCelery(_ context.Context, s spec) error {
	cmd := celeryCommand(s, s.RedisURL, "produce", s.Job, strconv.Itoa(s.Jobs))
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// celeryLeft counts the messages that wait and those that a worker has not acknowledged.
func celeryLeft(ctx context.Context, s spec) (int, error) {
	rdb, err := openRedis(s.RedisURL)
	if err != nil {
		return 0, err
	}
	defer rdb.Close()
	waiting, err := rdb.LLen(ctx, "celery").Result()
	if err != nil {
		return 0, err
	}
	unacked, err := rdb.HLen(ctx, "unacked").Result()
	return int(waiting + unacked), err
}

// workCelery works with one of Celery's pools: threads, which share the connections, or
// prefork, of whose processes each has one. Gossip, mingle and heartbeats are what Celery's
// users switch off for the sake of Redis. It leaves rec.started open, because no scenario
// with Celery asks for it.
func workCelery(pool string) func(context.Context, spec, *recorder) error {
	return func(ctx context.Context, s spec, rec *recorder) error {
		cmd := celeryCommand(s, s.WorkerRedisURL, "--quiet", "worker", "--pool", pool, "--concurrency", strconv.Itoa(s.Slots),
			"--prefetch-multiplier", strconv.Itoa(celeryPrefetch/s.Slots), "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "error")
		jobs, write, err := os.Pipe()
		if err != nil {
			return err
		}
		defer jobs.Close()
		cmd.ExtraFiles = []*os.File{write}
		worker, err := servers.StartProgram(cmd, nil)
		_ = write.Close()
		if err != nil {
			return err
		}
		rec.usage = func() (time.Duration, int64) { return usageOfGroup(worker.PID()) }
		unreadable := make(chan error, 1)
		go func() {
			if err := recordCelery(jobs, rec); err != nil {
				unreadable <- err
			}
		}()
		select {
		case <-ctx.Done():
			worker.Stop(time.Minute)
			return nil
		case <-worker.Done():
			worker.Stop(0)
			return errors.Join(errors.New("its worker has ended"), worker.Err())
		case err := <-unreadable:
			worker.Stop(time.Minute)
			return err
		}
	}
}

// recordCelery reads a line for each job that has ended, how long it waited in ns, until no
// process of the worker is left.
func recordCelery(jobs io.Reader, rec *recorder) error {
	lines := bufio.NewScanner(jobs)
	for lines.Scan() {
		waited, err := strconv.ParseInt(lines.Text(), 10, 64)
		if err != nil {
			return fmt.Errorf("what a job reports: %w", err)
		}
		rec.begin(time.Duration(waited))
		rec.end()
	}
	return lines.Err()
}
