package cli

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/maintenance"
	"github.com/carpool-go/carpool/tasks/rowsprune"
	"github.com/carpool-go/carpool/tasks/webhook"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

// aclUsers makes the users that docs/security.md has, under names of the test's own, and
// returns the URL of each by its name in the docs.
func aclUsers(t *testing.T, b *bundle) map[string]string {
	t.Helper()
	rdb, u := b.Redis(t), testservers.ParseURL(t, b.RedisURL)
	urls := make(map[string]string)
	for user, rules := range workertest.ACLUsers(t, "../../docs/security.md") {
		name := user + "-of-" + strings.Trim(u.Path, "/") // users are the server's, not the database's
		args := []any{"ACL", "SETUSER", name, "on", ">hush"}
		selector := ""
		for rule := range strings.FieldsSeq(rules) { // a selector is one argument, with spaces
			switch {
			case selector != "" || strings.HasPrefix(rule, "("):
				if selector = strings.TrimSpace(selector + " " + rule); strings.HasSuffix(rule, ")") {
					args, selector = append(args, selector), ""
				}
			default:
				args = append(args, rule)
			}
		}
		if err := rdb.Do(t.Context(), args...).Err(); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		t.Cleanup(func() {
			if err := rdb.Do(context.Background(), "ACL", "DELUSER", name).Err(); err != nil {
				t.Error(err)
			}
		})
		of := *u
		of.User = url.UserPassword(name, "hush")
		urls[user] = of.String()
	}
	return urls
}

// requireNoPermission fails unless Redis refuses each command.
func requireNoPermission(t *testing.T, user, url string, commands []string) {
	t.Helper()
	rdb := workertest.OpenRedis(t, url)
	for _, command := range commands {
		var args []any
		for _, arg := range strings.Fields(command) {
			args = append(args, strings.ReplaceAll(arg, "_", " "))
		}
		err := rdb.Do(t.Context(), args...).Err()
		if err == nil || !strings.HasPrefix(err.Error(), "NOPERM") && !strings.Contains(err.Error(), "The user executing the script can't") {
			t.Errorf("%s may do %q: %v", user, command, err)
		}
	}
}

func TestACL_TheUsersOfTheDocsCanDoTheirPartAndNoMore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	users := aclUsers(t, b)
	b.Env = append(b.Env, "REDIS_URL="+users["worker"])
	w := receive(t)
	refused := func(user string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("%s: %v", user, err)
		}
	}
	command := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, args...)
		if code != 0 {
			t.Errorf("worker %q: exit code %d\n%s%s", args, code, stdout, stderr)
		}
		return stdout
	}
	only := tasks.NewClient(workertest.OpenRedis(t, users["enqueue"]))
	enqueue := func(p tasks.Payload, opts *tasks.EnqueueOptions) *tasks.Info {
		t.Helper()
		info, err := only.Enqueue(t.Context(), p, opts)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	hook := webhook.Deliver{URL: w.URL, Event: "test.happened", Body: json.RawMessage(`{}`)}

	// One that another worker has to rescue, while all the rest goes on.
	dying := b.Start(t, w.env()...)
	orphan := enqueue(hook, nil)
	<-w.arrived
	dying.Signal(t, syscall.SIGKILL)
	dying.Exit(t)
	p := b.Start(t, append(w.env(), "PRUNE_ALLOW=public.events")...)

	// Enqueued by Go, later, by SQL and by the shell, and done.
	both := tasks.NewClient(workertest.OpenRedis(t, users["enqueue_and_wait"]))
	unique := &tasks.EnqueueOptions{UniqueKey: "k", RunAt: time.Now().Add(time.Second)}
	held, err := both.Enqueue(t.Context(), maintenance.Prune{}, unique)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := both.Enqueue(t.Context(), maintenance.Prune{}, unique); !isDuplicate(err) {
		t.Errorf("a second job with the unique key: %v", err)
	}
	if _, err := both.Wait(t.Context(), held.Queue, held.ID, nil); err != nil {
		t.Error(err)
	}
	workertest.Eventually(t, "the key is free again", func() bool {
		_, err := both.Enqueue(t.Context(), maintenance.Prune{}, &tasks.EnqueueOptions{UniqueKey: "k"})
		if err != nil && !isDuplicate(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	for range 2 {
		if _, err := both.Enqueue(t.Context(), maintenance.Prune{}, &tasks.EnqueueOptions{ID: "mine", RunAt: time.Now().Add(time.Hour)}); err != nil {
			t.Errorf("the same id again: %v", err)
		}
	}
	refused("enqueue, a unique key", ignore(only.Enqueue(t.Context(), maintenance.Prune{}, unique)))
	b.Exec(t, "CREATE TABLE events (at date); SELECT carpool.enqueue('rows:prune', '{\"table\": \"events\", \"column\": \"at\", \"older_than\": \"1d\"}', retention => '1 h', queue => 'low')")
	workertest.Eventually(t, "the outbox's job is done", func() bool {
		info, err := b.Inspector.GetQueueInfo("low")
		return err == nil && info.Completed == 1
	})
	command("enqueue", "carpool:prune", "{}", "--wait")

	// Tried again.
	failing := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Retry-After", "1")
		rw.WriteHeader(http.StatusServiceUnavailable)
	}))
	t.Cleanup(failing.Close)
	retried := enqueue(webhook.Deliver{URL: failing.URL, Event: "x", Body: json.RawMessage(`{}`)}, nil)
	workertest.Eventually(t, "it is tried again", func() bool {
		info, err := b.Inspector.GetTaskInfo("default", retried.ID)
		return err == nil && info.Retried >= 1
	})
	refused("enqueue, to cancel", only.Cancel(t.Context(), retried.ID))
	refused("enqueue, to look", ignore(only.Get(t.Context(), "default", retried.ID)))
	refused("enqueue_and_wait, to cancel", both.Cancel(t.Context(), retried.ID))
	command("cancel", retried.ID)

	// Cancelled while it runs, and given up.
	running := enqueue(hook, nil)
	<-w.arrived
	command("cancel", running.ID)
	refusedJob := enqueue(rowsprune.Prune{Table: "nowhere", Column: "at", OlderThan: "1d"}, nil)
	if _, err := b.Wait(t, refusedJob); !errors.Is(err, tasks.ErrJobFailed) {
		t.Error(err)
	}
	if out := command("archive", "ls"); !strings.Contains(out, running.ID) || !strings.Contains(out, refusedJob.ID) {
		t.Errorf("archive ls:\n%s", out)
	}
	command("archive", "show", refusedJob.ID)
	command("archive", "retry", refusedJob.ID)
	workertest.Eventually(t, "it is given up again", func() bool {
		info, err := b.Inspector.GetTaskInfo("default", refusedJob.ID)
		return err == nil && info.State == asynq.TaskStateArchived
	})
	command("archive", "delete", "--all")

	// Looked at.
	command("pause", "low")
	command("resume", "low")
	if out := command("status"); !strings.Contains(out, "low") {
		t.Errorf("status:\n%s", out)
	}
	url, stop := startMonitor(t, map[string]string{"REDIS_URL": users["worker"]})
	for _, page := range []string{"/api/queues", "/api/queues/default/pending_tasks", "/api/servers", "/api/redis_info", "/api/scheduler_entries"} {
		if code, body := ask(t, url+page, nil); code != http.StatusOK {
			t.Errorf("%s answers %d\n%s", page, code, body)
		}
	}
	if code, log := stop(); code != 0 {
		t.Errorf("the monitor exits with %d\n%s", code, log)
	}

	key := asynqwire.Task("default", orphan.ID)
	for _, user := range []string{"enqueue", "enqueue_and_wait"} {
		requireNoPermission(t, user, users[user], []string{
			"HGETALL " + key, "HGET " + key + " msg", "DEL " + key, "GET " + key, "UNLINK " + key, "RENAME " + key + " asynq:x",
			"LRANGE " + asynqwire.Active("default") + " 0 -1", "LPOP " + asynqwire.Active("default"), "ZRANGE " + asynqwire.Archived("default") + " 0 -1",
			"SMEMBERS " + asynqwire.Queues, "SREM " + asynqwire.Queues + " default", "SET " + asynqwire.Paused("default") + " 1",
			"HSET " + asynqwire.Paused("default") + " a b", "LPUSH " + asynqwire.Active("default") + " x", "ZADD " + asynqwire.Archived("default") + " 1 x",
			"PUBLISH asynq:cancel " + orphan.ID, "SUBSCRIBE asynq:cancel", "KEYS *", "SCAN 0", "RANDOMKEY",
			"EVAL return_redis.call('HGETALL',KEYS[1]) 1 " + key, "EVAL return_redis.call('DEL',KEYS[1]) 1 " + key,
			"SADD other x", "HSET other a b", "EVAL return_redis.call('SADD',KEYS[1],'x') 1 other", "GET carpool:instances",
			"FLUSHDB", "INFO", "CONFIG GET *", "ACL LIST", "CLIENT LIST", "SCRIPT FLUSH", "FUNCTION FLUSH",
		})
	}
	requireNoPermission(t, "enqueue", users["enqueue"], []string{"HMGET " + key + " msg", "SET carpool:unique:x 1", "GET carpool:unique:x"})
	requireNoPermission(t, "worker", users["worker"], []string{
		"SET other 1", "GET other", "DEL other", "RENAME asynq:x other", "EVAL return_redis.call('SET',KEYS[1],'x') 1 other",
		"PUBLISH other x", "PSUBSCRIBE *", "KEYS *", "FLUSHDB", "CONFIG GET *", "ACL LIST", "CLIENT LIST", "SLOWLOG GET", "MONITOR",
	})
	for _, never := range []string{"FLUSHALL", "SHUTDOWN", "DEBUG", "REPLICAOF", "MODULE"} { // is not tried where others work
		for user := range users {
			said, err := b.Redis(t).Do(t.Context(), "ACL", "DRYRUN", testservers.ParseURL(t, users[user]).User.Username(), never, "x", "y").Text()
			if err == nil && said == "OK" {
				t.Errorf("%s may do %s", user, never)
			}
		}
	}

	// Rescued.
	w.open()
	if _, err := b.Wait(t, orphan); err != nil {
		t.Errorf("the job whose worker was killed: %v", err)
	}
	p.Signal(t, syscall.SIGTERM)
	if code := p.Exit(t); code != 0 {
		t.Errorf("the worker exits with %d", code)
	}
	for _, log := range []string{dying.Log.String(), p.Log.String()} {
		if strings.Contains(log, "NOPERM") || strings.Contains(log, "permission") {
			t.Errorf("a worker lacks a permission:\n%s", log)
		}
	}
}

func isDuplicate(err error) bool {
	_, ok := errors.AsType[*tasks.DuplicateError](err)
	return ok
}

// ignore is the error of a call.
func ignore(_ *tasks.Info, err error) error { return err }
