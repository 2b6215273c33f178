package asynqwire_test

import (
	"bytes"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

func TestCountKinds_CountsJobsThatWaitAndReadsNoPayload(t *testing.T) {
	t.Parallel()
	rdb := openRedis(t)
	client := asynq.NewClientFromRedisClient(rdb)
	enqueue := func(kind string, payload []byte, opts ...asynq.Option) *asynq.TaskInfo {
		t.Helper()
		info, err := client.Enqueue(asynq.NewTask(kind, payload, append(opts, asynq.Queue("q"))...))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	for range 30 { // more than one script takes
		enqueue("mail:send", bytes.Repeat([]byte("x"), 5000))
	}
	enqueue("mail:send", nil, asynq.ProcessIn(time.Hour))
	enqueue("parcel:send", nil, asynq.ProcessIn(time.Hour))
	enqueue(strings.Repeat("k", 600), nil) // longer than what is read
	lost := enqueue("mail:lost", nil)
	if err := rdb.Del(t.Context(), asynqwire.Task("q", lost.ID)).Err(); err != nil {
		t.Fatal(err)
	}
	got, err := asynqwire.CountKinds(t.Context(), rdb, "q", 100)
	if want := map[string]int{"mail:send": 31, "parcel:send": 1}; err != nil || !maps.Equal(got, want) {
		t.Errorf("kinds %v, want %v: %v", got, want, err)
	}
	got, err = asynqwire.CountKinds(t.Context(), rdb, "q", 10)
	if want := map[string]int{"mail:send": 11, "parcel:send": 1}; err != nil || !maps.Equal(got, want) {
		t.Errorf("of the first 10 of each state: kinds %v, want %v: %v", got, want, err)
	}
}
