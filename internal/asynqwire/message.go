package asynqwire

import (
	"errors"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of asynq's message of a task that carpool reads or changes, from asynq's
// internal/proto/asynq.proto.
const (
	fieldType         protowire.Number = 1
	fieldID           protowire.Number = 3
	fieldQueue        protowire.Number = 4
	fieldRetried      protowire.Number = 6
	fieldErrorMessage protowire.Number = 7
	fieldUniqueKey    protowire.Number = 10
	fieldLastFailedAt protowire.Number = 11
	fieldRetention    protowire.Number = 12
	fieldCompletedAt  protowire.Number = 13
	fieldGroupKey     protowire.Number = 14
	fieldHeaders      protowire.Number = 15
)

// Message is what carpool reads and changes of asynq's message of a task. The rest of
// it is kept as it is.
type Message struct {
	ID, Queue    string
	Retried      int // retries used
	LastErr      string
	LastFailedAt int64 // in Unix seconds; 0 if it has not failed
	CompletedAt  int64 // in Unix seconds; 0 if it is not completed

	// Retention is how long the job is kept when it is done; 0 is not at all. It is only
	// read.
	Retention time.Duration

	uniqueKey string // asynq's own; "" for none
	rest      []byte
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
		if kind == protowire.BytesType && !isReadable(number, data[n:]) {
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
			switch {
			case number == fieldID && kind == protowire.BytesType:
				m.ID, _ = protowire.ConsumeString(data[n:])
			case number == fieldQueue && kind == protowire.BytesType:
				m.Queue, _ = protowire.ConsumeString(data[n:])
			case number == fieldUniqueKey && kind == protowire.BytesType:
				m.uniqueKey, _ = protowire.ConsumeString(data[n:])
			case number == fieldRetention && kind == protowire.VarintType:
				m.Retention = time.Duration(int64(varint)) * time.Second
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

// isReadable reports whether asynq can read a field of bytes: texts, also those in pairs,
// must be UTF-8.
func isReadable(number protowire.Number, field []byte) bool {
	value, _ := protowire.ConsumeBytes(field)
	switch number {
	case fieldHeaders:
		for len(value) > 0 {
			number, kind, n := protowire.ConsumeTag(value)
			if n < 0 {
				return false
			}
			size := protowire.ConsumeFieldValue(number, kind, value[n:])
			if size < 0 || kind == protowire.BytesType && !isReadable(fieldID, value[n:]) { // a text as well
				return false
			}
			value = value[n+size:]
		}
		return true
	case fieldType, fieldID, fieldQueue, fieldErrorMessage, fieldUniqueKey, fieldGroupKey:
		return utf8.Valid(value)
	default:
		return true
	}
}
