package delivery

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// untilEnd is a handler that takes so long, unless it has to end before.
func untilEnd(ctx context.Context, d time.Duration) (string, error) {
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(d):
		return "whole", nil
	}
}

// asynq takes a lease's end from its own clock when it asks for a job, and may have asked
// long before there was one.
func TestClient_JobAfterALongIdleTimeIsNotCutOff(t *testing.T) {
	t.Parallel()
	f := execute(t, func(ctx context.Context, _ *tasks.Job, _ probe) (string, error) { return untilEnd(ctx, 8*time.Second) })
	time.Sleep(asynqwire.LeaseTime + time.Second)
	if result, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil || string(result) != `"whole"` {
		t.Errorf("result %s, error %v", result, err)
	}
}

// Another worker has been given the one job, or a failover has lost its lease, and its
// handler doesn't notice.
func TestClient_LostJobDoesNotTakeTheOthersOfItsQueueAlong(t *testing.T) {
	t.Parallel()
	b := setup(t)
	end, started := make(chan struct{}), make(chan struct{}, 2)
	f := b.execute(t, b, func(s *tasks.Set) {
		tasks.Register(s, func(ctx context.Context, _ *tasks.Job, p probe) (string, error) {
			started <- struct{}{}
			if p.Word == "stuck" {
				<-end
				return "", nil
			}
			return untilEnd(ctx, asynqwire.LeaseTime+4*leaseEvery)
		})
	})
	defer close(end)
	stuck := f.enqueue(t, "stuck", nil)
	<-started
	other := f.enqueue(t, "other", nil)
	<-started
	if n := b.Redis(t).ZRem(t.Context(), asynqwire.Leases("default"), stuck.ID).Val(); n != 1 {
		t.Fatal("the job has no lease")
	}
	if result, err := f.Wait(t, other); err != nil || string(result) != `"whole"` {
		t.Errorf("the other one: result %s, error %v", result, err)
	}
}

func TestClient_StopIsBoundedWhileRedisIsSilent(t *testing.T) {
	t.Parallel()
	b := setup(t)
	at, _, proxy := b.behindProxies(t)
	queues := map[string]int{"default": 1, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1}
	f := b.executeWith(t, executionConfig{at: at, queues: queues}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, probe) (string, error) { return "", nil })
	})
	if _, err := f.Wait(t, f.enqueue(t, "x", nil)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // asynq subscribes, which it waits for without an end
	proxy.Blackhole()
	time.Sleep(9 * time.Second) // asynq looks for completed jobs to be deleted each 8 s
	began := time.Now()
	f.servers.Stop()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %s; no job was running", took)
	}
	proxy.Heal()
}

func TestClient_StopDoesNotWaitForAHandlerThatIsStuckBeyondItsTime(t *testing.T) {
	t.Parallel()
	end, started := make(chan struct{}), make(chan struct{})
	f := execute(t, func(context.Context, *tasks.Job, probe) (string, error) {
		close(started)
		<-end
		return "", nil
	})
	defer f.stop()
	defer close(end)
	f.enqueue(t, "x", &tasks.EnqueueOptions{Timeout: time.Second})
	<-started
	f.log.Wait(t, "the handler goes on although its context has ended")
	time.Sleep(2 * asynqwire.TimeoutGrace) // asynq doesn't wait for it any more
	stopped := make(chan struct{})
	go func() { f.servers.Stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(12 * time.Second): // 1 s to finish, 2 s for winding up
		t.Error("it waits for the handler")
	}
}

// New connections are refused while others leak theirs.
func TestEnds_ArriveAlthoughRedisHasNoConnectionLeft(t *testing.T) {
	t.Parallel()
	for _, why := range []refusal{
		"ERR max number of clients reached", "NOAUTH Authentication required.",
		"WRONGPASS invalid username-password pair or user is disabled.",
	} {
		t.Run(strings.Fields(string(why))[0], func(t *testing.T) {
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
			info := f.enqueue(t, "x", nil)
			workertest.Eventually(t, "it has run", refused.Load)
			workertest.Eventually(t, "its end is told, or given up", func() bool { return f.servers.Held() == 0 })
			if got, err := f.Inspector.GetTaskInfo("default", info.ID); err != nil || got.State != asynq.TaskStateCompleted {
				t.Errorf("it is %+v, %v; want it completed", got, err)
			}
		})
	}
}

// wire is a network that is slow, or loses packets for a while: what was sent meanwhile
// arrives when the kernel sends it again, also if the one who sent it is gone.
type wire struct {
	rate int // bytes a second from the server; 0 for as many as there are

	mu   sync.Mutex
	lost chan struct{} // is closed when packets arrive again; nil while they do
}

// resent is how long after that the kernel sends again what was lost.
const resent = 1500 * time.Millisecond

func (w *wire) lose() (heal func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	lost := make(chan struct{})
	w.lost = lost
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.lost = nil
		close(lost)
	}
}

// through returns the bundle's servers with Redis behind the wire.
func (w *wire) through(t *testing.T, b *bundle) *bundle {
	t.Helper()
	u, err := url.Parse(b.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	target := u.Host
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	work.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			work.Go(func() { w.ask(server, client) })
			work.Go(func() { w.answer(client, server) })
		}
	})
	u.Host = l.Addr().String()
	at := &bundle{new(workertest.Bundle)}
	at.DatabaseURL, at.RedisURL = b.DatabaseURL, u.String()
	return at
}

func (w *wire) ask(server, client net.Conn) {
	defer server.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		w.mu.Lock()
		lost := w.lost
		w.mu.Unlock()
		if lost != nil {
			<-lost
			time.Sleep(resent)
		}
		if _, e := server.Write(buf[:n]); err != nil || e != nil {
			time.Sleep(50 * time.Millisecond) // a server may drop what a client has asked that is gone
			return
		}
	}
}

func (w *wire) answer(client, server net.Conn) {
	defer client.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := server.Read(buf)
		if w.rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(w.rate))
		}
		if _, e := client.Write(buf[:n]); e != nil {
			_, _ = io.Copy(io.Discard, server)
			return
		}
		if err != nil {
			return
		}
	}
}

// The fetch has been made again by then, so nobody waits for what it brings.
func TestFetcher_FetchThatArrivesLateKeepsNoJobs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	w := new(wire)
	var done atomic.Int32
	f := b.executeWith(t, executionConfig{at: w.through(t, b), slots: 20}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, forgotten) (any, error) {
			time.Sleep(20 * time.Millisecond)
			done.Add(1)
			return nil, nil
		})
	})
	const jobs = 3000
	for i := range jobs {
		if _, err := f.Client.Enqueue(t.Context(), forgotten{fmt.Sprint(i)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	heal := w.lose()
	time.Sleep(3 * time.Second)
	heal()
	workertest.Eventually(t, "no job waits", func() bool {
		q, err := b.Inspector.GetQueueInfo("default")
		return err == nil && q.Pending == 0
	})
	time.Sleep(4 * time.Second)
	if q, err := b.Inspector.GetQueueInfo("default"); err != nil || done.Load() < jobs {
		t.Errorf("%d of %d jobs have run; %d are active, and %d held; %v", done.Load(), jobs, q.Active, f.servers.Held(), err)
	}
}

func TestFetcher_BatchThatTakesLongerThanAFetchMayArrivesAllTheSame(t *testing.T) {
	t.Parallel()
	b := setup(t)
	w := &wire{rate: 2 << 20}
	if _, err := b.Client.Enqueue(t.Context(), forgotten{"makes the queue"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Inspector.PauseQueue("default"); err != nil {
		t.Fatal(err)
	}
	var done atomic.Int32
	f := b.executeWith(t, executionConfig{at: w.through(t, b), slots: 20}, func(s *tasks.Set) {
		tasks.Register(s, func(context.Context, *tasks.Job, forgotten) (any, error) {
			done.Add(1)
			return nil, nil
		})
	})
	const jobs = 20
	for range jobs { // 4 MB together, which take 2 s
		if _, err := f.Client.Enqueue(t.Context(), forgotten{strings.Repeat("x", 200_000)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Inspector.UnpauseQueue("default"); err != nil {
		t.Fatal(err)
	}
	for giveUp := time.Now().Add(25 * time.Second); done.Load() < jobs+1 && time.Now().Before(giveUp); {
		time.Sleep(50 * time.Millisecond)
	}
	if done.Load() < jobs+1 {
		t.Errorf("%d of %d jobs have run", done.Load(), jobs+1)
	}
}
