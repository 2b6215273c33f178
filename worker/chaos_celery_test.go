//go:build unix

package worker_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// celery is the chaos test's mode for comparison: Celery and SQLAlchemy, as
// testdata/celery_app.py has them.
const celery = "celery"

// celeryMode is what a run with Celery has besides.
type celeryMode struct {
	rdb      *redis.Client // past all proxies
	producer *celeryProducer
}

func newCelery(c *chaos) *celeryMode {
	c.t.Helper()
	if err := servers.FindCelery(); err != nil {
		c.t.Fatal(err)
	}
	options, err := redis.ParseURL(c.redis.URL())
	if err != nil {
		c.t.Fatal(err)
	}
	m := &celeryMode{rdb: redis.NewClient(options)}
	c.t.Cleanup(func() { _ = m.rdb.Close() })
	// The report looks at asynq's queue too. It has to be there, and stays empty.
	if err := m.rdb.SAdd(c.t.Context(), "asynq:queues", "default").Err(); err != nil {
		c.t.Fatal(err)
	}
	m.producer = &celeryProducer{env: c.producers.env, log: filepath.Join(c.logs, celery+"-producer.log")}
	c.t.Cleanup(m.producer.stop)
	return m
}

// celeryCommand is a Python program of testdata with a process group of its own, of
// which a Celery worker's processes are all members.
func celeryCommand(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command(servers.CeleryPython, args...)
	cmd.Dir, cmd.Env = "testdata", append(slices.Clone(env), "PYTHONDONTWRITEBYTECODE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// celeryWorker has as many processes as carpool's worker has hands. Gossip and mingle
// are what Celery's users switch off for its sake on Redis.
func celeryWorker(n *chaosNode) *exec.Cmd {
	return celeryCommand(n.env, "-m", "celery", "-A", "celery_app", "worker", "-n", n.name+"@chaos",
		"--pool", "prefork", "--concurrency", "10", "--without-gossip", "--without-mingle", "--loglevel", "warning")
}

// signal sends a worker a signal; to all of its processes, if it has more than one, as
// to a machine.
func (p *chaosProcess) signal(s syscall.Signal) {
	if p.cmd.SysProcAttr == nil || !p.cmd.SysProcAttr.Setpgid {
		_ = p.cmd.Process.Signal(s)
		return
	}
	select {
	case <-p.done: // its number may be another's by now
	default:
		_ = syscall.Kill(-p.cmd.Process.Pid, s)
	}
}

// celeryUnderway is how many messages wait or are unacknowledged. While a worker takes
// one it is in neither list, so they must stay empty for a while.
func (c *chaos) celeryUnderway() (int, error) {
	for range 20 {
		var waiting, unacked *redis.IntCmd
		_, err := c.celery.rdb.TxPipelined(c.t.Context(), func(p redis.Pipeliner) error {
			waiting, unacked = p.LLen(c.t.Context(), "celery"), p.HLen(c.t.Context(), "unacked")
			return nil
		})
		if err != nil {
			return 0, err
		}
		if n := int(waiting.Val() + unacked.Val()); n > 0 {
			return n, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return 0, nil
}

var celeryID = regexp.MustCompile(`\\*"id\\*": \\*"(chaos-\d+)`)

// celeryLate tells the jobs without an effect that Redis still holds from those that
// are lost.
func (c *chaos) celeryLate(r *chaosReport) {
	var waiting, unacked []string
	workertest.Eventually(c.t, "Celery's messages can be read", func() bool {
		var err, err2 error
		waiting, err = c.celery.rdb.LRange(c.t.Context(), "celery", 0, -1).Result()
		unacked, err2 = c.celery.rdb.HVals(c.t.Context(), "unacked").Result()
		return errors.Join(err, err2) == nil
	})
	held := make(map[string]bool)
	for _, message := range append(waiting, unacked...) {
		if id := celeryID.FindStringSubmatch(message); id != nil {
			held[id[1]] = true
		}
	}
	for _, n := range r.wrong {
		job, _ := c.enqueued.Load(n)
		if enqueued, ok := job.(chaosJob); ok && held[enqueued.id] && !c.hasEffect(n) {
			r.lost--
			r.late++
		}
	}
}

func (c *chaos) hasEffect(n int) (there bool) {
	if err := c.db.QueryRow(c.t.Context(), "SELECT EXISTS (SELECT FROM effects WHERE n = $1)", n).Scan(&there); err != nil {
		c.t.Error(err)
	}
	return there
}

// celeryProducer is a Python process that enqueues, and is started again if it ends.
type celeryProducer struct {
	env []string
	log string

	mu      sync.Mutex // guards what follows
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	waiting map[string]chan error // by number, for the broker's answer
	stopped bool
	reading sync.WaitGroup
}

// enqueue returns nil once the broker has acknowledged job n. It never gives up a number
// that the process still works on: that would enqueue it twice.
func (p *celeryProducer) enqueue(ctx context.Context, n int) error {
	answer := make(chan error, 1)
	p.mu.Lock()
	err := p.start()
	if err == nil {
		p.waiting[fmt.Sprint(n)] = answer
		_, err = fmt.Fprintln(p.stdin, n)
	}
	p.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// start starts the process if it does not run. The lock is held.
func (p *celeryProducer) start() error {
	if p.cmd != nil || p.stopped {
		return nil
	}
	log, err := os.OpenFile(p.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := celeryCommand(p.env, "celery_produce.py")
	cmd.Stderr = log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd, p.stdin, p.waiting = cmd, stdin, make(map[string]chan error)
	p.reading.Go(func() { p.read(cmd, stdout) })
	return nil
}

// read hands out the answers of a process until it ends.
func (p *celeryProducer) read(cmd *exec.Cmd, stdout io.Reader) {
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		verdict, rest, _ := strings.Cut(lines.Text(), " ")
		n, reason, _ := strings.Cut(rest, " ")
		var err error
		if verdict != "ok" {
			err = errors.New(reason)
		}
		p.mu.Lock()
		if answer := p.waiting[n]; answer != nil {
			answer <- err
			delete(p.waiting, n)
		}
		p.mu.Unlock()
	}
	_ = cmd.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, answer := range p.waiting {
		answer <- errors.New("the producer has ended")
	}
	p.cmd = nil
}

func (p *celeryProducer) stop() {
	p.mu.Lock()
	p.stopped = true
	if p.cmd != nil {
		_ = p.cmd.Process.Kill()
	}
	p.mu.Unlock()
	p.reading.Wait()
}
