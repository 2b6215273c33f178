// Package instance names what belongs to one instance, which is one worker process: its
// queue, and its keys in Redis.
package instance

import (
	"cmp"
	"errors"
	"regexp"
	"strings"

	"github.com/google/uuid"

	"github.com/carpool-go/carpool/internal/asynqwire"
)

// NewName makes a name that begins with one, or with "worker" for none, and is different
// for any two instances that live at once. It is fit for the name of a queue, and for a key
// in Redis: what isn't becomes a hyphen, and what is beyond 60 characters is left out.
func NewName(begins string) string {
	fit := strings.Map(func(r rune) rune {
		if asynqwire.IsQueueName(string(r)) {
			return r
		}
		return '-'
	}, begins)
	return cmp.Or(fit[:min(len(fit), 60)], "worker") + "-" + uuid.NewString()[:8]
}

// QueuePrefix begins the names of the instances' own queues.
const QueuePrefix = "instance-"

// Queue is the queue that only the instance of this name pulls from.
func Queue(name string) string { return QueuePrefix + name }

// queue matches the queues whose names are made from a name of [NewName], and not a queue
// of the user's that only begins like them.
var queue = regexp.MustCompile(`^` + QueuePrefix + `.+-[0-9a-f]{8}$`)

// IsQueue reports whether a queue is an instance's own.
func IsQueue(name string) bool { return queue.MatchString(name) }

// ValidateKind is the kind of job that instances' own queues are for.
const ValidateKind = "pool:validate"

// CheckQueue returns why a job of a kind can't be put on a queue: an instance's own takes
// [ValidateKind] alone, because any other job there keeps that instance from validating its
// pool for as long as it runs. The trigger outbox_queue of internal/schema says the same.
func CheckQueue(queue, kind string) error {
	if IsQueue(queue) && kind != ValidateKind {
		return errors.New("queue: is a worker's own, which takes " + ValidateKind + " alone")
	}
	return nil
}

// OfQueue is the name of the instance whose own queue this is.
func OfQueue(queue string) string { return strings.TrimPrefix(queue, QueuePrefix) }

// Names is the key of a sorted set of the names of all instances, by when each last wrote
// its snapshot, in Unix seconds. Nobody has to scan for them.
const Names = "carpool:instances"

// SnapshotKey is the key of an instance's snapshot. Its braces put it into the slot of a
// Redis Cluster that has the instance's own queue, so that one script can read the one and
// remove the other.
func SnapshotKey(name string) string { return "carpool:instance:{" + Queue(name) + "}" }
