package asynqwire

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of asynq's message of a task that carpool reads or changes, from asynq's
// internal/proto/asynq.proto.
const (
	fieldID           protowire.Number = 3
	fieldRetried      protowire.Number = 6
	fieldErrorMessage protowire.Number = 7
	fieldLastFailedAt protowire.Number = 11
	fieldCompletedAt  protowire.Number = 13
)

// Message is what carpool reads and changes of asynq's message of a task. The rest of
// it is kept as it is.
type Message struct {
	ID           string
	Retried      int // retries used
	LastErr      string
	LastFailedAt int64 // in Unix seconds; 0 if it has not failed
	CompletedAt  int64 // in Unix seconds; 0 if it is not completed
	rest         []byte
}

// ErrMessage is returned for data that is no message of asynq's.
var ErrMessage = errors.New("asynq's task message can't be read")

// ParseMessage reads the field "msg" of a job's hash. The error says nothing of its
// content.
func ParseMessage(data []byte) (Message, error) {
	m := Message{rest: make([]byte, 0, len(data))}
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return Message{}, ErrMessage
		}
		size := protowire.ConsumeFieldValue(number, kind, data[n:])
		if size < 0 {
			return Message{}, ErrMessage
		}
		varint, _ := protowire.ConsumeVarint(data[n:])
		switch {
		case number == fieldRetried && kind == protowire.VarintType:
			m.Retried = int(varint)
		case number == fieldLastFailedAt && kind == protowire.VarintType:
			m.LastFailedAt = int64(varint)
		case number == fieldCompletedAt && kind == protowire.VarintType:
			m.CompletedAt = int64(varint)
		case number == fieldErrorMessage && kind == protowire.BytesType:
			m.LastErr, _ = protowire.ConsumeString(data[n:])
		default:
			if number == fieldID && kind == protowire.BytesType {
				m.ID, _ = protowire.ConsumeString(data[n:])
			}
			m.rest = append(m.rest, data[:n+size]...)
		}
		data = data[n+size:]
	}
	return m, nil
}

// Encode returns the message as asynq reads it.
func (m Message) Encode() []byte {
	data := make([]byte, 0, len(m.rest)+len(m.LastErr)+32)
	data = append(data, m.rest...)
	data = appendVarint(data, fieldRetried, int64(m.Retried))
	if m.LastErr != "" {
		data = protowire.AppendTag(data, fieldErrorMessage, protowire.BytesType)
		data = protowire.AppendString(data, m.LastErr)
	}
	data = appendVarint(data, fieldLastFailedAt, m.LastFailedAt)
	return appendVarint(data, fieldCompletedAt, m.CompletedAt)
}

func appendVarint(data []byte, number protowire.Number, v int64) []byte {
	if v == 0 {
		return data
	}
	return protowire.AppendVarint(protowire.AppendTag(data, number, protowire.VarintType), uint64(v))
}
