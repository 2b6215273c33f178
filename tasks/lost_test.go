package tasks_test

import (
	"errors"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/asynqwire/wiretest"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/internal/unique"
	"github.com/carpool-go/carpool/tasks"
)

// openLost opens a Redis whose jobs lose their data.
func openLost(t *testing.T) redis.UniversalClient {
	t.Helper()
	rdb, err := tasks.OpenRedis(testservers.Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

func TestClient_OfAJobThatHasLostItsDataItSaysSoAndCancelRemovesIt(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"pending", "scheduled", "retry"} {
		for _, how := range append(wiretest.Losses(), "unreadable") {
			t.Run(state+" "+how, func(t *testing.T) {
				t.Parallel()
				rdb := openLost(t)
				client := tasks.NewClient(rdb)
				wiretest.Put(t, rdb, "default", "a", state)
				wiretest.Lose(t, rdb, "default", "a", how)
				if _, err := client.Get(t.Context(), "default", "a"); !errors.Is(err, tasks.ErrJobLost) {
					t.Errorf("Get: %v", err)
				}
				if result, err := client.Wait(t.Context(), "default", "a", nil); !errors.Is(err, tasks.ErrJobLost) {
					t.Errorf("Wait: %s, %v", result, err)
				}
				if err := client.Cancel(t.Context(), "a"); err != nil {
					t.Errorf("Cancel: %v", err)
				}
				if state, err := asynqwire.Listed(t.Context(), rdb, "default", "a"); state != "" || err != nil {
					t.Errorf("it is still %s, %v", state, err)
				}
			})
		}
	}
}

func TestClient_AJobWhoseDataGoesWhileItRunsOrHasEndedIsWhereItsPlaceTells(t *testing.T) {
	t.Parallel()
	rdb := openLost(t)
	client := tasks.NewClient(rdb)
	for _, state := range []string{"active", "completed", "archived"} {
		wiretest.Put(t, rdb, "default", state, state)
		wiretest.Lose(t, rdb, "default", state, "deleted")
		info, err := client.Get(t.Context(), "default", state)
		if err != nil || info.ID != state || info.Queue != "default" || info.State != tasks.State(state) {
			t.Errorf("%s: %+v, %v", state, info, err)
		}
	}
	if result, err := client.Wait(t.Context(), "default", "completed", nil); result != nil || err != nil {
		t.Errorf("of the completed one: %s, %v", result, err)
	}
	if _, err := client.Wait(t.Context(), "default", "archived", nil); !errors.Is(err, tasks.ErrJobFailed) {
		t.Errorf("of the archived one: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := client.Wait(t.Context(), "default", "active", nil)
		done <- err
	}()
	select {
	case err := <-done:
		t.Errorf("one that runs is not waited for: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := asynqwire.ForgetActive(t.Context(), rdb, "default", "active"); err != nil { // as the end of its run does
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("of the one that ran: %v", err)
	}
}

func TestEnqueue_WhatIsLeftOfAJobBlocksNeitherItsIDNorItsUniqueKey(t *testing.T) {
	t.Parallel()
	rdb := openLost(t)
	client := tasks.NewClient(rdb)
	opts := &tasks.EnqueueOptions{ID: "a", UniqueKey: "k"}
	if _, err := client.Enqueue(t.Context(), parcel{To: "Ada"}, opts); err != nil {
		t.Fatal(err)
	}
	wiretest.Lose(t, rdb, "default", "a", "without message")
	info, err := client.Enqueue(t.Context(), parcel{To: "Ada"}, opts)
	if err != nil || info.State != tasks.StatePending {
		t.Errorf("again with its id: %+v, %v", info, err)
	}
	if n, err := rdb.LLen(t.Context(), asynqwire.Pending("default")).Result(); n != 1 || err != nil {
		t.Errorf("%d jobs wait, %v", n, err)
	}
	// The holder of the key was seen long ago: it has had its time to be enqueued.
	wiretest.Lose(t, rdb, "default", "a", "overwritten")
	key := unique.Key("parcel:send", "k")
	if err := rdb.Set(t.Context(), key, "a 1 default", time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Enqueue(t.Context(), parcel{To: "Bo"}, &tasks.EnqueueOptions{UniqueKey: "k"}); err != nil {
		t.Errorf("with its key: %v", err)
	}
}
