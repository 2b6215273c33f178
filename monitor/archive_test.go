package monitor

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

// note is a job that nobody runs.
type note struct{}

func (note) Kind() string           { return "note" }
func (note) Options() tasks.Options { return tasks.Options{} }
func (note) Validate() error        { return nil }

// archiveOf is a Redis with jobs in the archive of the queue default.
type archiveOf struct {
	rdb       redis.UniversalClient
	client    *tasks.Client
	inspector *asynq.Inspector
}

func newArchive(t *testing.T) archiveOf {
	t.Helper()
	rdb := open(t, testservers.Redis(t))
	return archiveOf{rdb, tasks.NewClient(rdb), asynq.NewInspectorFromRedisClient(rdb)}
}

// add enqueues a job and gives it up after two tries.
func (a archiveOf) add(t *testing.T, uniqueKey string) (id string) {
	t.Helper()
	info, err := a.client.Enqueue(t.Context(), note{}, &tasks.EnqueueOptions{UniqueKey: uniqueKey})
	if err != nil {
		t.Fatal(err)
	}
	msg, err := asynqwire.ReadMessage(t.Context(), a.rdb, info.Queue, info.ID)
	if err != nil {
		t.Fatal(err)
	}
	msg.Retried = 2
	if err := a.rdb.HSet(t.Context(), asynqwire.Task(info.Queue, info.ID), "msg", msg.Encode()).Err(); err != nil {
		t.Fatal(err)
	}
	if err := a.inspector.ArchiveTask(info.Queue, info.ID); err != nil {
		t.Fatal(err)
	}
	return info.ID
}

// taken adds a job whose unique key another job holds by now.
func (a archiveOf) taken(t *testing.T, uniqueKey string) (id string) {
	t.Helper()
	id = a.add(t, uniqueKey)
	if _, err := a.client.Enqueue(t.Context(), note{}, &tasks.EnqueueOptions{UniqueKey: uniqueKey}); err != nil {
		t.Fatal(err)
	}
	return id
}

// expect checks that each job is pending with all its tries, or as it was in the archive.
func (a archiveOf) expect(t *testing.T, state asynq.TaskState, ids ...string) {
	t.Helper()
	retried := 2
	if state == asynq.TaskStatePending {
		retried = 0
	}
	for _, id := range ids {
		info, err := a.inspector.GetTaskInfo("default", id)
		if err != nil {
			t.Fatal(err)
		}
		if info.State != state || info.Retried != retried {
			t.Errorf("job %s is %s after %d retries, want %s after %d", id, info.State, info.Retried, state, retried)
		}
	}
}

// press sends what a button of the page does, and returns the answer.
func press(t *testing.T, at, button, body string) (int, string) {
	t.Helper()
	return ask(t, http.MethodPost, at+"/api/queues/default/archived_tasks"+button, func(r *http.Request) {
		r.Header.Set("Origin", at)
		r.Body = io.NopCloser(strings.NewReader(body))
	})
}

func TestArchive_OneJobIsPutBackWithAllItsTriesAndItsUniqueKey(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	id, other := a.add(t, "k"), a.add(t, "")
	at := serve(t, Config{Redis: a.rdb})
	if code, body := press(t, at, "/"+id+":run", ""); code != http.StatusNoContent || body != "" {
		t.Errorf("it answers %d\n%s", code, body)
	}
	a.expect(t, asynq.TaskStatePending, id)
	a.expect(t, asynq.TaskStateArchived, other)
	_, err := a.client.Enqueue(t.Context(), note{}, &tasks.EnqueueOptions{UniqueKey: "k"})
	if err == nil || !strings.Contains(err.Error(), id) {
		t.Errorf("the unique key is not its own again: %v", err)
	}
	for _, gone := range []string{id, "nobody"} {
		if code, body := press(t, at, "/"+gone+":run", ""); code != http.StatusNotFound {
			t.Errorf("a job that is not in the archive: %d\n%s", code, body)
		}
	}
}

func TestArchive_AJobWhoseUniqueKeyIsHeldStays(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	id := a.taken(t, "k")
	at := serve(t, Config{Redis: a.rdb})
	if code, body := press(t, at, "/"+id+":run", ""); code != http.StatusConflict || !strings.Contains(body, `"k"`) {
		t.Errorf("it answers %d\n%s", code, body)
	}
	a.expect(t, asynq.TaskStateArchived, id)
}

func TestArchive_SomeJobsArePutBackAndTheOthersNamed(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	first, second, left, held := a.add(t, ""), a.add(t, "a"), a.add(t, ""), a.taken(t, "k")
	at := serve(t, Config{Redis: a.rdb})
	ids, err := json.Marshal(map[string][]string{"task_ids": {first, held, "nobody", second}})
	if err != nil {
		t.Fatal(err)
	}
	code, body := press(t, at, ":batch_run", string(ids))
	var answer map[string][]string
	if err := json.Unmarshal([]byte(body), &answer); code != http.StatusOK || err != nil {
		t.Fatalf("it answers %d, %v\n%s", code, err, body)
	}
	if diff := cmp.Diff(map[string][]string{"pending_ids": {first, second}, "error_ids": {held, "nobody"}}, answer); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
	a.expect(t, asynq.TaskStatePending, first, second)
	a.expect(t, asynq.TaskStateArchived, left, held)

	if code, body := press(t, at, ":batch_run", `{"task_ids": []}`); code != http.StatusOK || body != `{"pending_ids":[],"error_ids":[]}`+"\n" {
		t.Errorf("for none: %d\n%s", code, body)
	}
	for name, request := range map[string]string{
		"no JSON": "first", "another field": `{"ids": []}`, "more than a page sends": `{"task_ids": ["` + strings.Repeat("x", maxRequest) + `"]}`,
	} {
		if code, _ := press(t, at, ":batch_run", request); code != http.StatusBadRequest {
			t.Errorf("%s: %d", name, code)
		}
	}
}

func TestArchive_AllJobsOfOneQueueArePutBackButThoseWhoseUniqueKeysAreHeld(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	ids, held := []string{a.add(t, ""), a.add(t, "a"), a.add(t, "")}, a.taken(t, "k")
	elsewhere, err := a.client.Enqueue(t.Context(), note{}, &tasks.EnqueueOptions{Queue: "low"})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.inspector.ArchiveTask("low", elsewhere.ID); err != nil {
		t.Fatal(err)
	}
	at := serve(t, Config{Redis: a.rdb})
	if code, body := press(t, at, ":run_all", ""); code != http.StatusOK || body != `{"scheduled":3}`+"\n" {
		t.Errorf("it answers %d\n%s", code, body)
	}
	a.expect(t, asynq.TaskStatePending, ids...)
	a.expect(t, asynq.TaskStateArchived, held)
	if info, err := a.inspector.GetTaskInfo("low", elsewhere.ID); err != nil || info.State != asynq.TaskStateArchived {
		t.Errorf("the job of another queue is %+v, %v", info, err)
	}
}

func TestArchive_IsOnlyForWhoMayChangeIt(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	id := a.add(t, "")
	open, locked, readOnly := serve(t, Config{Redis: a.rdb}), serve(t, Config{Redis: a.rdb, Password: "open sesame"}), serve(t, Config{Redis: a.rdb, ReadOnly: true})
	for _, button := range []string{"/" + id + ":run", ":batch_run", ":run_all"} {
		body := `{"task_ids": ["` + id + `"]}`
		if code, _ := press(t, readOnly, button, body); code != http.StatusMethodNotAllowed {
			t.Errorf("%s, read-only: %d", button, code)
		}
		if code, _ := press(t, locked, button, body); code != http.StatusUnauthorized {
			t.Errorf("%s, without the login: %d", button, code)
		}
		code, _ := ask(t, http.MethodPost, open+"/api/queues/default/archived_tasks"+button, func(r *http.Request) {
			r.Header.Set("Origin", "https://evil.example")
			r.Body = io.NopCloser(strings.NewReader(body))
		})
		if code != http.StatusForbidden {
			t.Errorf("%s, of another page: %d", button, code)
		}
	}
	a.expect(t, asynq.TaskStateArchived, id)
}

func TestArchive_OtherRequestsReachAsynqmon(t *testing.T) {
	t.Parallel()
	a := newArchive(t)
	listed, deleted := a.add(t, ""), a.add(t, "")
	at := serve(t, Config{Redis: a.rdb})
	if code, body := ask(t, http.MethodGet, at+"/api/queues/default/archived_tasks", nil); code != http.StatusOK || !strings.Contains(body, listed) {
		t.Errorf("the list: %d\n%s", code, body)
	}
	if code, body := ask(t, http.MethodDelete, at+"/api/queues/default/archived_tasks/"+deleted, nil); code != http.StatusNoContent {
		t.Errorf("a deletion: %d\n%s", code, body)
	}
	if code, body := press(t, at, ":batch_delete", `{"task_ids": ["`+listed+`"]}`); code != http.StatusOK || !strings.Contains(body, listed) {
		t.Errorf("several deletions: %d\n%s", code, body)
	}
	pending, err := a.client.Enqueue(t.Context(), note{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if code, body := ask(t, http.MethodPost, at+"/api/queues/default/pending_tasks/"+pending.ID+":archive", nil); code != http.StatusNoContent {
		t.Errorf("an archival: %d\n%s", code, body)
	}
}

func TestArchive_WithoutRedisIsAnError(t *testing.T) {
	t.Parallel()
	at := serve(t, Config{Redis: open(t, "redis://127.0.0.1:1")})
	for _, button := range []string{"/some:run", ":run_all"} {
		if code, _ := press(t, at, button, ""); code != http.StatusInternalServerError {
			t.Errorf("%s: %d", button, code)
		}
	}
}
