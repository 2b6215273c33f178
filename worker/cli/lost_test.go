package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/worker/internal/workertest"
)

func TestStatus_NamesTheJobsThatHaveLostTheirDataAndShowsTheRest(t *testing.T) {
	t.Parallel()
	b := onRedis(t)
	rdb := b.Redis(t)
	for _, state := range asynqwire.States() {
		for _, how := range wiretest.Losses() {
			id := state + strings.ReplaceAll(how, " ", "-")
			wiretest.Put(t, rdb, "default", id, state)
			wiretest.Lose(t, rdb, "default", id, how)
		}
	}
	wiretest.Put(t, rdb, "low", "a", "archived")
	wiretest.Lose(t, rdb, "low", "a", "deleted")
	wiretest.Put(t, rdb, "middle", "a", "retry")
	if err := rdb.Set(t.Context(), asynqwire.Pending("middle"), "mine", 0).Err(); err != nil {
		t.Fatal(err)
	}
	out, stderr, code := b.run(t, nil, "status")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	const lost = "their keys in Redis were evicted, deleted or overwritten; set its maxmemory-policy to noeviction."
	var said []string
	for _, line := range lines(out) {
		if strings.HasPrefix(line, "default ") || strings.HasPrefix(line, "! default: ") || strings.HasPrefix(line, "! low: ") || strings.HasPrefix(line, "! middle: ") {
			said = append(said, line)
		}
	}
	want := []string{
		"default 3 3 3 3 3 0s",
		"! default: jobs have lost their data (3 active, 3 archived, 3 completed, 3 pending, 3 retry, 3 scheduled): " + lost +
			" The queue's workers remove what is left of those that wait, and log their ids. See: archive ls.",
		"! low: jobs have lost their data (1 archived): " + lost + " See: archive ls.",
		"! middle: the key asynq:{middle}:pending in Redis is no list of jobs; somebody has overwritten it: delete it",
	}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("(-want +got):\n%s\n%s", diff, out)
	}

	out, _, code = b.run(t, nil, "status", "--json")
	var got struct {
		Queues []struct {
			Name       string         `json:"name"`
			Lost       map[string]int `json:"lost"`
			Unreadable []string       `json:"unreadable"`
		} `json:"queues"`
	}
	if err := json.Unmarshal([]byte(out), &got); code != 0 || err != nil || len(got.Queues) != 3 {
		t.Fatalf("JSON: %d, %v\n%s", code, err, out)
	}
	if q := got.Queues[0]; q.Lost["pending"] != 3 || q.Lost["completed"] != 3 || len(got.Queues[2].Unreadable) != 1 {
		t.Errorf("JSON: %+v", got)
	}
}

// onRedis is a bundle without a database.
func onRedis(t *testing.T) *bundle {
	t.Helper()
	url := testservers.Redis(t)
	return &bundle{&workertest.Bundle{RedisURL: url, Env: []string{"REDIS_URL=" + url}}}
}

func TestArchive_NamesTheJobsThatHaveLostTheirDataAndDeletesWhatIsLeft(t *testing.T) {
	t.Parallel()
	b := onRedis(t)
	rdb := b.Redis(t)
	for _, id := range []string{"sound", "lost", "lost2"} {
		wiretest.Put(t, rdb, "default", id, "archived")
	}
	wiretest.Lose(t, rdb, "default", "lost", "deleted")
	wiretest.Lose(t, rdb, "default", "lost2", "overwritten")
	archive := func(args ...string) (stdout, stderr string) {
		t.Helper()
		stdout, stderr, code := b.run(t, nil, append([]string{"archive"}, args...)...)
		if code != 0 {
			t.Fatalf("archive %q exits with %d: %s%s", args, code, stdout, stderr)
		}
		return stdout, stderr
	}
	if out, _ := archive("ls"); strings.Count(out, "\n") != 4 || strings.Count(out, "its data is gone from Redis") != 2 {
		t.Errorf("ls:\n%s", out)
	}
	if out, _ := archive("show", "lost"); !strings.Contains(out, "its data is gone from Redis") {
		t.Errorf("show:\n%s", out)
	}
	out, stderr := archive("retry", "--all")
	if !strings.HasPrefix(out, "sound ") || strings.Count(out, "\n") != 1 ||
		!strings.Contains(stderr, "lost stays: its data is gone from Redis; its key was evicted, deleted or overwritten; remove what is left of it with: worker archive delete 'lost'") {
		t.Errorf("retry:\n%s%s", out, stderr)
	}
	if out, _ = archive("delete", "--reason", "its data is gone"); strings.Count(out, "deleted") != 2 {
		t.Errorf("delete:\n%s", out)
	}
	if out, _ = archive("ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("ls then:\n%s", out)
	}
}

func TestCancel_RemovesWhatIsLeftOfAJob(t *testing.T) {
	t.Parallel()
	b := onRedis(t)
	rdb := b.Redis(t)
	wiretest.Put(t, rdb, "default", "lost", "pending")
	wiretest.Lose(t, rdb, "default", "lost", "deleted")
	if out, stderr, code := b.run(t, nil, "cancel", "lost"); code != 0 || out != "lost cancelled\n" {
		t.Errorf("exit code %d: %s%s", code, out, stderr)
	}
	if n := rdb.Exists(t.Context(), asynqwire.Pending("default")).Val(); n != 0 {
		t.Error("it still waits")
	}
}
