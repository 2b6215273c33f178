package delivery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestEnds_ArrivesAlthoughRedisIsAwayWhenTheJobEnds(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]func(*testservers.Proxy){
		"refused":         func(p *testservers.Proxy) { p.Refuse(); p.Reset() },
		"does not answer": (*testservers.Proxy).Blackhole,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			at, _, proxy := b.behindProxies(t)
			var runs atomic.Int32
			ended := make(chan struct{}, 10)
			f := b.execute(t, at, func(s *tasks.Set) {
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) {
					runs.Add(1)
					fault(proxy)
					ended <- struct{}{}
					return "result", nil
				})
			})
			// asynq waits without an end for the answer to its subscription, and can't
			// be shut down meanwhile.
			rdb := b.Redis(t)
			db, err := url.Parse(b.RedisURL)
			if err != nil {
				t.Fatal(err)
			}
			workertest.Eventually(t, "the two servers have subscribed, and the worker", func() bool {
				clients := rdb.ClientList(t.Context()).Val()
				return len(regexp.MustCompile(` db=`+strings.Trim(db.Path, "/")+` sub=1 `).FindAllString(clients, -1)) == 3
			})
			info := f.enqueue(t, "x", nil)
			<-ended
			time.Sleep(5 * time.Second) // longer than asynq and go-redis alone go on trying
			proxy.Heal()
			if result, err := f.Wait(t, info); err != nil || string(result) != `"result"` {
				t.Errorf("result %s, error %v", result, err)
			}
			if n := runs.Load(); n != 1 {
				t.Errorf("it ran %d times", n)
			}
		})
	}
}

// losing is a Redis whose answer is lost once, or the question.
type losing struct {
	lost     *atomic.Bool
	is       func(cmd redis.Cmder) bool // what is lost; asked when it has been answered
	question bool
	after    func(ctx context.Context) // called before the loss is noticed
}

func (losing) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l losing) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (l losing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if !l.question {
			if err := next(ctx, cmds); err != nil {
				return err
			}
		}
		if slices.ContainsFunc(cmds, l.is) && l.lost.CompareAndSwap(false, true) {
			if l.after != nil {
				l.after(ctx)
			}
			for _, cmd := range cmds {
				cmd.SetErr(io.ErrUnexpectedEOF)
			}
			return io.ErrUnexpectedEOF
		}
		if l.question {
			return next(ctx, cmds)
		}
		return nil
	}
}

// endTo are the scripts that end an attempt and move its job to a list.
func endTo(list string) func(redis.Cmder) bool {
	return func(cmd redis.Cmder) bool {
		keys := fmt.Sprintln(cmd.Args()...)
		return strings.Contains(keys, "}:active ") && strings.Contains(keys, "}:t:") && strings.Contains(keys, "}:"+list+" ") &&
			!strings.Contains(keys, "}:paused")
	}
}

// Meanwhile the job runs elsewhere, and may have failed there.
func TestEnds_ThatArrivedIsNotSaidAgain(t *testing.T) {
	t.Parallel()
	for name, failures := range map[string]int32{"for the second time": 1, "for the third time": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var runs, atOnce, most atomic.Int32
			again := make(chan struct{})
			register := func(s *tasks.Set) {
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
					n := runs.Add(1)
					if n <= failures {
						return nil, tasks.RetryAfter(time.Millisecond, errors.New("not today"))
					}
					if n == failures+1 {
						close(again)
					}
					most.Store(max(most.Load(), atOnce.Add(1)))
					time.Sleep(4 * time.Second)
					atOnce.Add(-1)
					return nil, nil
				})
			}
			var lost atomic.Bool
			var first *execution
			first = b.executeWith(t, executionConfig{slots: 1, hook: losing{lost: &lost, is: endTo("retry"), after: func(context.Context) {
				first.fetchesNoMore()
				<-again
			}}}, register)
			info, err := b.Client.Enqueue(t.Context(), probe{"x"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			workertest.Eventually(t, "it has failed", lost.Load)
			b.execute(t, b, register)
			if _, err := b.Wait(t, info); err != nil {
				t.Error(err)
			}
			time.Sleep(2 * time.Second)
			if runs.Load() != failures+1 || most.Load() != 1 {
				t.Errorf("%d runs, %d at once", runs.Load(), most.Load())
			}
		})
	}
}

// Redis had forgotten the fetch, and gave the job to another worker.
func TestEnds_OfAJobThatIsAnothersByNowLeavesItThere(t *testing.T) {
	t.Parallel()
	for name, verdict := range map[string]error{"failed": errors.New("not today"), "archived": tasks.Permanent(errors.New("never"))} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			rdb := b.Redis(t)
			leases := asynqwire.Leases("default")
			theirs := redis.Z{Score: float64(time.Now().Add(30*time.Second).Unix()) + 0.5}
			f := b.execute(t, b, func(s *tasks.Set) {
				tasks.Register(s, func(ctx context.Context, job *tasks.Job, _ probe) (any, error) {
					theirs.Member = job.ID
					rdb.ZAdd(ctx, leases, theirs)
					time.Sleep(6 * time.Second) // a heartbeat comes every 5 s
					return nil, verdict
				})
			})
			info := f.enqueue(t, "x", nil)
			f.records(t, 1)
			f.stop()
			if got := rdb.ZRangeWithScores(t.Context(), leases, 0, -1).Val(); len(got) != 1 || got[0] != theirs {
				t.Errorf("the leases are %v, want %v", got, theirs)
			}
			got, err := f.Inspector.GetTaskInfo("default", info.ID)
			if err != nil || got.State != asynq.TaskStateActive || got.Retried != 0 {
				t.Errorf("it is %+v, %v; want it active", got, err)
			}
		})
	}
}

// It is pushed back at the end of the worker.
func TestEnds_OfAJobThatIsPushedBackIsSettledByLooking(t *testing.T) {
	t.Parallel()
	for name, arrives := range map[string]bool{"arrived": true, "did not arrive": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var lost atomic.Bool
			started := make(chan struct{})
			f := b.executeWith(t, executionConfig{hook: losing{lost: &lost, is: endTo("pending"), question: !arrives}}, func(s *tasks.Set) {
				tasks.Register(s, func(ctx context.Context, _ *tasks.Job, _ probe) (any, error) {
					close(started)
					<-ctx.Done()
					return nil, ctx.Err()
				})
			})
			info := f.enqueue(t, "x", nil)
			<-started
			f.stop()
			if !lost.Load() {
				t.Error("no answer was lost")
			}
			if got, err := f.Inspector.GetTaskInfo("default", info.ID); err != nil || got.State != asynq.TaskStatePending || got.Retried != 0 {
				t.Errorf("it is %+v, %v; want it pending", got, err)
			}
		})
	}
}

// refusing is a Redis that takes no writes at times.
type refusing struct {
	now *atomic.Bool
	why refusal
}

type refusal string

func (r refusal) Error() string { return string(r) }
func (refusal) RedisError()     {}

func (refusing) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (refusing) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (r refusing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if !r.now.Load() {
			return next(ctx, cmds)
		}
		for _, cmd := range cmds {
			cmd.SetErr(r.why)
		}
		return r.why
	}
}

func TestEnds_ArrivesAlthoughRedisTakesNoWritesWhenTheJobEnds(t *testing.T) {
	t.Parallel()
	for _, why := range []refusal{
		"NOREPLICAS Not enough good replicas to write.", "MISCONF Redis is configured to save RDB snapshots, but can't",
		"OOM command not allowed when used memory > 'maxmemory'.", "READONLY You can't write against a read only replica.",
	} {
		t.Run(string(why[:7]), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var refused atomic.Bool
			f := b.executeWith(t, executionConfig{hook: refusing{&refused, why}}, func(s *tasks.Set) {
				tasks.Register(s, func(context.Context, *tasks.Job, probe) (any, error) {
					refused.Store(true)
					time.AfterFunc(time.Second, func() { refused.Store(false) })
					return nil, nil
				})
			})
			if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
				t.Error(err)
			}
		})
	}
}

// forgotten is a probe whose jobs leave nothing behind.
type forgotten struct {
	Word string `json:"word"`
}

func (forgotten) Kind() string           { return "forgotten" }
func (forgotten) Options() tasks.Options { return tasks.Options{} }
func (forgotten) Validate() error        { return nil }

// Another worker has finished it.
func TestExecutor_ResultOfAJobThatIsGoneIsNotWritten(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rdb := b.Redis(t)
	started, gone := make(chan struct{}), make(chan struct{})
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, forgotten) (string, error) {
			close(started)
			<-gone
			return "result", nil
		})
	})
	info, err := b.Client.Enqueue(t.Context(), forgotten{"x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	<-started
	pipe := rdb.TxPipeline()
	pipe.LRem(t.Context(), asynqwire.Active("default"), 0, info.ID)
	pipe.ZRem(t.Context(), asynqwire.Leases("default"), info.ID)
	pipe.Del(t.Context(), asynqwire.Task("default", info.ID))
	if _, err := pipe.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(gone)
	f.records(t, 1)
	f.stop()
	if left := rdb.HGetAll(t.Context(), asynqwire.Task("default", info.ID)).Val(); len(left) > 0 {
		t.Errorf("there is a hash %v without a job", left)
	}
}
