package monitor

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/internal/testservers"
)

func TestMonitor_ShowsQueuesOfWhichJobsHaveLostTheirData(t *testing.T) {
	t.Parallel()
	for _, state := range asynqwire.States() {
		for _, how := range wiretest.Losses() {
			t.Run(state+" "+how, func(t *testing.T) {
				t.Parallel()
				rdb := open(t, testservers.Redis(t))
				for _, id := range []string{"first", "lost", "last"} {
					wiretest.Put(t, rdb, "default", id, state)
				}
				wiretest.Lose(t, rdb, "default", "lost", how)
				at := serve(t, Config{Redis: rdb})
				for _, path := range []string{"", "/default", "/default/groups"} {
					if code, page := ask(t, "GET", at+"/api/queues"+path, nil); code != 200 || !strings.Contains(page, `"`+state+`":3`) {
						t.Errorf("/api/queues%s answers %d\n%s", path, code, page)
					}
				}
				code, page := ask(t, "GET", at+"/api/queues/default/"+state+"_tasks", nil)
				var shown struct {
					Tasks []struct {
						ID        string `json:"id"`
						LastError string `json:"error_message"`
					} `json:"tasks"`
				}
				if err := json.Unmarshal([]byte(page), &shown); code != 200 || err != nil {
					t.Fatalf("the jobs' page answers %d, %v\n%s", code, err, page)
				}
				said := make(map[string]string)
				for _, task := range shown.Tasks {
					said[task.ID] = task.LastError
				}
				if len(said) != 3 || said["first"] != "" || said["last"] != "" || !strings.HasPrefix(said["lost"], "its data is gone") {
					t.Errorf("the jobs are %q", said)
				}
			})
		}
	}
}

func TestMonitor_ShowsAQueueWithAJobThatCannotBeRead(t *testing.T) {
	t.Parallel()
	rdb := open(t, testservers.Redis(t))
	at := serve(t, Config{Redis: rdb})
	for _, state := range asynqwire.States() {
		wiretest.Put(t, rdb, "default", state, state)
		wiretest.Lose(t, rdb, "default", state, "unreadable")
	}
	for _, path := range []string{"", "/default", "/default/pending_tasks", "/default/scheduled_tasks", "/default/retry_tasks", "/default/archived_tasks", "/default/completed_tasks"} {
		if code, page := ask(t, "GET", at+"/api/queues"+path, nil); code != 200 {
			t.Errorf("/api/queues%s answers %d\n%s", path, code, page)
		}
	}
}

func TestMonitor_DeletesWhatIsLeftOfAnArchivedJob(t *testing.T) {
	t.Parallel()
	rdb := open(t, testservers.Redis(t))
	at := serve(t, Config{Redis: rdb})
	for _, id := range []string{"sound", "lost"} {
		wiretest.Put(t, rdb, "default", id, "archived")
	}
	wiretest.Lose(t, rdb, "default", "lost", "deleted")
	one := at + "/api/queues/default/archived_tasks/lost"
	if code, page := ask(t, "POST", one+":run", nil); code != http.StatusGone || !strings.Contains(page, "its data is gone") {
		t.Errorf("run answers %d: %s", code, page)
	}
	if code, page := ask(t, "DELETE", one, nil); code != http.StatusNoContent {
		t.Errorf("delete answers %d: %s", code, page)
	}
	if code, _ := ask(t, "DELETE", one, nil); code != http.StatusNotFound {
		t.Errorf("a second time it answers %d", code)
	}
	if code, page := ask(t, "DELETE", at+"/api/queues/default/archived_tasks/sound", nil); code != http.StatusNoContent {
		t.Errorf("delete of a sound job answers %d: %s", code, page)
	}
	if n, err := rdb.Exists(t.Context(), asynqwire.Archived("default"), asynqwire.Task("default", "sound")).Result(); n != 0 || err != nil {
		t.Errorf("%d keys are left, %v", n, err)
	}
}

func TestMonitor_StillShowsRedisItself(t *testing.T) {
	t.Parallel()
	if code, page := ask(t, "GET", serve(t, Config{})+"/api/redis_info", nil); code != 200 || !strings.Contains(page, "redis_version") {
		t.Errorf("it answers %d\n%.300s", code, page)
	}
}
