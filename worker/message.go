package main

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of asynq's task message that are read or changed here; from
// internal/proto/asynq.proto, where they can't change without breaking every
// task in Redis.
const (
	fieldID           protowire.Number = 3
	fieldRetried      protowire.Number = 6
	fieldErrorMessage protowire.Number = 7
	fieldLastFailedAt protowire.Number = 11
	fieldCompletedAt  protowire.Number = 13
)

// message is what is read and changed of asynq's message of a task.
type message struct {
	id           string
	retried      int // retries used
	lastErr      string
	lastFailedAt int64 // Unix seconds
	completedAt  int64 // Unix seconds
	rest         []byte
}

func parseMessage(data []byte) (message, error) {
	m := message{rest: make([]byte, 0, len(data))}
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return message{}, errors.New("asynq's task message can't be read")
		}
		size := protowire.ConsumeFieldValue(number, kind, data[n:])
		if size < 0 {
			return message{}, errors.New("asynq's task message can't be read")
		}
		varint, _ := protowire.ConsumeVarint(data[n:])
		switch {
		case number == fieldRetried && kind == protowire.VarintType:
			m.retried = int(varint)
		case number == fieldLastFailedAt && kind == protowire.VarintType:
			m.lastFailedAt = int64(varint)
		case number == fieldCompletedAt && kind == protowire.VarintType:
			m.completedAt = int64(varint)
		case number == fieldErrorMessage && kind == protowire.BytesType:
			m.lastErr, _ = protowire.ConsumeString(data[n:])
		default:
			if number == fieldID && kind == protowire.BytesType {
				m.id, _ = protowire.ConsumeString(data[n:])
			}
			m.rest = append(m.rest, data[:n+size]...)
		}
		data = data[n+size:]
	}
	return m, nil
}

func (m message) encode() []byte {
	data := make([]byte, 0, len(m.rest)+len(m.lastErr)+32)
	data = append(data, m.rest...)
	data = appendVarint(data, fieldRetried, int64(m.retried))
	if m.lastErr != "" {
		data = protowire.AppendTag(data, fieldErrorMessage, protowire.BytesType)
		data = protowire.AppendString(data, m.lastErr)
	}
	data = appendVarint(data, fieldLastFailedAt, m.lastFailedAt)
	return appendVarint(data, fieldCompletedAt, m.completedAt)
}

func appendVarint(data []byte, number protowire.Number, v int64) []byte {
	if v == 0 {
		return data
	}
	return protowire.AppendVarint(protowire.AppendTag(data, number, protowire.VarintType), uint64(v))
}
