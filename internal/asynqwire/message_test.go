package asynqwire_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hibiken/asynq"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/tasks"
)

func TestMain(m *testing.M) { testservers.Main(m) }

func TestMessage_ChangesWhatItShouldAndNothingElse(t *testing.T) {
	t.Parallel()
	rdb, err := tasks.OpenRedis(testservers.Redis(t))
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	before, err := asynq.NewClientFromRedisClient(rdb).EnqueueContext(t.Context(),
		asynq.NewTaskWithHeaders("probe", []byte(`{"word":"x"}`), map[string]string{asynqwire.UniqueHeader: "k"}),
		asynq.MaxRetry(5), asynq.Timeout(time.Minute), asynq.Retention(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	inspector := asynq.NewInspectorFromRedisClient(rdb)
	if before, err = inspector.GetTaskInfo(before.Queue, before.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		msg, err := asynqwire.ReadMessage(t.Context(), rdb, before.Queue, before.ID)
		if err != nil {
			t.Fatal(err)
		}
		msg.Retried++
		msg.LastErr, msg.LastFailedAt, msg.CompletedAt = "no", 1_700_000_000, 1_700_000_001
		if err := rdb.HSet(t.Context(), asynqwire.Task(before.Queue, before.ID), "msg", msg.Encode()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	after, err := inspector.GetTaskInfo(before.Queue, before.ID)
	if err != nil {
		t.Fatal(err)
	}
	want := *before
	want.Retried, want.LastErr, want.LastFailedAt, want.CompletedAt = 2, "no", time.Unix(1_700_000_000, 0), time.Unix(1_700_000_001, 0)
	if diff := cmp.Diff(&want, after, cmpopts.IgnoreFields(asynq.TaskInfo{}, "NextProcessAt")); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err := asynqwire.ParseMessage([]byte{0xff}); err == nil {
		t.Error("nonsense is parsed")
	}
}

func FuzzParseMessage(f *testing.F) {
	f.Add([]byte("\x0a\x05probe\x12\x02{}\x30\x03\x3a\x02no\x58\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		msg, err := asynqwire.ParseMessage(data)
		if err != nil {
			return
		}
		encoded := msg.Encode()
		again, err := asynqwire.ParseMessage(encoded)
		if diff := cmp.Diff(msg, again, cmpopts.IgnoreUnexported(asynqwire.Message{})); diff != "" || err != nil {
			t.Errorf("it is read back as another: %v (-want +got)\n%s", err, diff)
		}
		if !bytes.Equal(encoded, again.Encode()) {
			t.Error("what it doesn't know is not kept")
		}
	})
}
