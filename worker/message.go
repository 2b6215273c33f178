package main

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of asynq's task message that are changed here; from
// internal/proto/asynq.proto, where they can't change without breaking every
// task in Redis.
const (
	fieldRetried      protowire.Number = 6
	fieldErrorMessage protowire.Number = 7
	fieldLastFailedAt protowire.Number = 11
)

// editMessage returns asynq's message of a task with another number of retries
// used, changed by retried, and, unless it is "", another last error at the time
// now in Unix seconds.
func editMessage(message []byte, retried func(int) int, lastErr string, now int64) ([]byte, error) {
	edited := make([]byte, 0, len(message)+len(lastErr)+16)
	used := 0
	for rest := message; len(rest) > 0; {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil, errors.New("asynq's task message can't be read")
		}
		size := protowire.ConsumeFieldValue(number, kind, rest[n:])
		if size < 0 {
			return nil, errors.New("asynq's task message can't be read")
		}
		switch {
		case number == fieldRetried && kind == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(rest[n:])
			used = int(v)
		case lastErr != "" && (number == fieldErrorMessage || number == fieldLastFailedAt):
		default:
			edited = append(edited, rest[:n+size]...)
		}
		rest = rest[n+size:]
	}
	edited = protowire.AppendTag(edited, fieldRetried, protowire.VarintType)
	edited = protowire.AppendVarint(edited, uint64(retried(used)))
	if lastErr != "" {
		edited = protowire.AppendTag(edited, fieldErrorMessage, protowire.BytesType)
		edited = protowire.AppendString(edited, lastErr)
		edited = protowire.AppendTag(edited, fieldLastFailedAt, protowire.VarintType)
		edited = protowire.AppendVarint(edited, uint64(now))
	}
	return edited, nil
}
