// Package asynqwire is all that carpool knows of asynq's Redis beyond asynq's own
// API: the names of its keys, its message of a task, the scripts that work on them,
// and what carpool writes beside them. asynq's names and fields are those of its
// internal/base and internal/proto, which can't change without losing every job that
// is in Redis.
package asynqwire

import (
	"regexp"
	"strconv"
	"time"
)

// Queues is the key of the set of the names of all queues.
const Queues = "asynq:queues"

// The keys of a queue are those of its lists of jobs' ids, pending and active, and of
// its sorted sets: of active jobs by their leases' end, of scheduled jobs and retries by
// when they are due, of archived and completed ones.

// Pending is the key of the list of jobs that wait; the next to be fetched is at its
// right end.
func Pending(queue string) string { return key(queue, "pending") }

// Active is the key of the list of jobs that a worker has fetched.
func Active(queue string) string { return key(queue, "active") }

// Leases is the key of the sorted set of active jobs by when their leases end, in Unix
// seconds.
func Leases(queue string) string { return key(queue, "lease") }

// Scheduled is the key of the sorted set of jobs by when they are due first, in Unix
// seconds.
func Scheduled(queue string) string { return key(queue, "scheduled") }

// Retry is the key of the sorted set of failed jobs by when they are due again, in Unix
// seconds.
func Retry(queue string) string { return key(queue, "retry") }

// Archived is the key of the sorted set of jobs that were given up, by when they were, in
// Unix seconds.
func Archived(queue string) string { return key(queue, "archived") }

// Completed is the key of the sorted set of retained jobs by when their retention ends,
// in Unix seconds.
func Completed(queue string) string { return key(queue, "completed") }

// groups is the key of the set of the names of asynq's groups that have jobs.
func groups(queue string) string { return key(queue, "groups") }

// group is the key of the sorted set of the jobs of a group, by when they were enqueued.
func group(queue, name string) string { return key(queue, "g:"+name) }

// aggregations is the key of the sorted set of the keys of the sorted sets of jobs that a
// server of asynq's is about to make one job of.
func aggregations(queue string) string { return key(queue, "aggregation_sets") }

// Paused is the key that is there while a queue is paused: no job of it is fetched.
func Paused(queue string) string { return key(queue, "paused") }

// Jobs are the keys of the lists and sorted sets that have a queue's jobs.
func Jobs(queue string) []string {
	return []string{
		Pending(queue), Active(queue),
		Scheduled(queue), Retry(queue), Archived(queue), Completed(queue),
	}
}

// Task is the key of a job's hash: its message in "msg", its "state", its "result".
func Task(queue, id string) string { return key(queue, "t:"+id) }

func key(queue, name string) string { return "asynq:{" + queue + "}:" + name }

const (
	// ArchiveLimit is how many jobs a queue's archive keeps. For each one more, the oldest is
	// dropped. asynq's scripts are told 10,000 and keep one less, whoever archives: a worker,
	// its Inspector, asynqmon.
	ArchiveLimit = 9_999
	// ArchiveWarning is from how many jobs on an archive is called nearly full.
	ArchiveWarning = 9_000
	// statsDays is how long asynq keeps its figures of a day, 90 days, and a day on either
	// side for clocks that differ.
	statsDays = 92
	// archiveDays is how long asynq keeps a job in the archive.
	archiveDays = 90
)

// queueKeys are the names of all keys of a queue but those of its jobs, the lists of jobs
// first, then the sorted sets of jobs.
func queueKeys(queue string, now time.Time) []string {
	keys := append(Jobs(queue), Leases(queue), Paused(queue), key(queue, "processed"), key(queue, "failed"))
	for day := range statsDays {
		date := now.UTC().AddDate(0, 0, 1-day).Format(time.DateOnly)
		keys = append(keys, key(queue, "processed:"+date), key(queue, "failed:"+date))
	}
	return keys
}

// queueName leaves out what would be read as a weight or a list, and the characters that
// have a meaning in the keys of a Redis Cluster.
var queueName = regexp.MustCompile(`^[A-Za-z0-9_.:-]{1,100}$`)

// IsQueueName reports whether a queue may have this name: 1 to 100 letters, digits, or
// _ . : -
func IsQueueName(name string) bool { return queueName.MatchString(name) }

const (
	// MaxRetryHeader is the header that carries how many times a job is tried again at
	// most.
	MaxRetryHeader = "carpool-max-retry"
	// SpareRetry is how many retries more than that asynq is told. asynq archives a job that
	// fails on its last try whatever the reason; with some to spare, whether a failure counts
	// is the worker's to decide, and a job whose last try had no end, or whose one run more
	// when it was put back, is looked at before it is given up.
	SpareRetry = 2
	// TimeoutGrace is added to the timeout that asynq is told, so that a handler whose time is
	// up can say so before asynq gives up waiting for it.
	TimeoutGrace = 2 * time.Second
	// UniqueHeader is the header that carries the key of a job's unique lock.
	UniqueHeader = "carpool-unique"
)

// MaxRetry returns how many times a job with these headers is tried again at most; false
// for a job that another program than carpool enqueued.
func MaxRetry(headers map[string]string) (int, bool) {
	n, err := strconv.Atoi(headers[MaxRetryHeader])
	return n, err == nil && n >= 0
}
