// Package asynqkey names asynq's keys in Redis, for what its own API doesn't reach. They are those of its internal/base,
// which can't change without losing every job that is in Redis.
package asynqkey

// List is the key of a queue's pending, active, lease, scheduled, retry, archived or completed jobs.
func List(queue, name string) string { return "asynq:{" + queue + "}:" + name }

// Task is the key of one job's hash: its message in "msg", its "state", its "result".
func Task(queue, id string) string { return List(queue, "t:"+id) }
