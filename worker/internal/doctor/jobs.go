package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/limit"
	"github.com/carpool-go/carpool/internal/outbox"
	"github.com/carpool-go/carpool/scheduler"
)

// checkJobs looks at the workers that are up, and at the jobs in both servers. Names that
// others have written are in what it says.
func (e *examination) checkJobs(ctx context.Context) []Finding {
	ctx, cancel := context.WithTimeout(ctx, jobsTimeout)
	defer cancel()
	if e.redis.client == nil {
		return e.checkConnections(0)
	}
	db := e.postgres.db
	if !e.postgres.tables {
		db = nil // it has no outbox, or doesn't show it, which is a finding already
	}
	status, err := admin.New(e.redis.client, db).Status(ctx)
	if status == nil {
		if redis.HasErrorPrefix(err, "NOPERM") {
			return append(e.checkConnections(0), notSeen("workers", "the rule that redis rights names", err))
		}
		return append(e.checkConnections(0), notSeen("workers", "", errors.New(explain("REDIS_URL", e.RedisURL, err))))
	}
	all := e.checkConnections(len(status.Instances))
	all = append(all, e.checkWorkers(status)...)
	all = append(all, e.checkQueues(status)...)
	all = append(all, e.checkLimit(ctx, status)...)
	if e.Tasks == nil {
		return all
	}
	if err != nil {
		all = append(all, notSeen("outbox", "", errors.New(explain("DATABASE_URL", e.Pool.URL, err))))
	}
	return append(all, e.checkKinds(ctx, status)...)
}

func (e *examination) checkWorkers(s *admin.Status) []Finding {
	r := &report{check: "workers"}
	if len(s.Instances) == 0 {
		r.warn("start one, unless this is before the first deploy", "none is up")
	}
	for _, m := range s.Missing {
		r.warn("see its log and its memory: it was killed, or doesn't reach Redis", "%s gives no sign of life", m.Name)
	}
	for _, i := range s.Instances {
		switch {
		case i.Blocked != "":
			r.fail("", "%s: transactional jobs can't begin: %s", i.Name, i.Blocked)
		case i.DatabaseAway:
			r.warn("", "%s: jobs wait for the database, which it does not reach", i.Name)
		}
	}
	return r.orOK("%s up", plural(len(s.Instances), "instance"))
}

// checkQueues finds the queues that nobody pulls from, those that jobs are on already and
// those that jobs of the worker's kinds will be on.
func (e *examination) checkQueues(s *admin.Status) []Finding {
	r := &report{check: "queues"}
	for _, q := range s.Queues {
		jobs := q.Pending + q.Active + q.Scheduled + q.Retry
		_, own := e.Queues[q.Name]
		switch {
		case jobs > 0 && !s.IsServed(q.Name) && own:
			r.warn("start a worker", "%s on the queue %s, which no worker that is up pulls from", jobsAre(jobs), q.Name)
		case jobs > 0 && !s.IsServed(q.Name):
			r.warn("add it to WORKER_QUEUES", "%s on the queue %s, which neither this worker nor one that is up pulls from", jobsAre(jobs), q.Name)
		case jobs > 0 && q.Paused:
			r.warn("the command resume ends the pause", "%s on the queue %s, which is paused", jobsAre(jobs), q.Name)
		}
		for _, key := range q.Unreadable {
			r.fail("delete it", "the key %s in Redis is no list of jobs; somebody has overwritten it", key)
		}
		if len(q.Lost) > 0 {
			r.warn("see the command status", "jobs of the queue %s have lost their data: their keys in Redis were evicted, deleted or overwritten", q.Name)
		}
		if q.ArchiveNearlyFull {
			r.warn("see the command archive", "the archive of the queue %s holds %d jobs; beyond %d, the oldest are dropped", q.Name, q.Archived, admin.ArchiveLimit)
		}
	}
	if e.Tasks != nil && len(e.Faults) == 0 {
		for queue, kinds := range e.kindsByQueue() {
			if _, own := e.Queues[queue]; !own && !s.IsServed(queue) {
				r.warn("add it to WORKER_QUEUES", "neither this worker nor one that is up pulls from the queue %s, which is that of %s", queue, strings.Join(kinds, ", "))
			}
		}
	}
	slices.SortStableFunc(r.findings, func(a, b Finding) int { return strings.Compare(a.Says, b.Says) })
	return r.orOK("each queue that has jobs, or gets them, has a worker")
}

func jobsAre(n int) string {
	if n == 1 {
		return "1 job is"
	}
	return fmt.Sprintf("%d jobs are", n)
}

// kindsByQueue are the worker's kinds by the queue that they go to unless told otherwise.
func (e *examination) kindsByQueue() map[string][]string {
	queues := make(map[string][]string)
	for _, kind := range e.Tasks.Kinds() {
		if task, err := e.Tasks.Lookup(kind); err == nil {
			queues[task.Options.Queue] = append(queues[task.Options.Queue], kind)
		}
	}
	return queues
}

// checkLimit compares the limit on payloads with the one in the database, which the worker
// that started last has written.
func (e *examination) checkLimit(ctx context.Context, s *admin.Status) []Finding {
	if !e.postgres.tables || len(s.Instances) == 0 || len(e.Faults) > 0 {
		return nil
	}
	r := &report{check: "payload limit"}
	var most int
	if err := e.postgres.db.QueryRow(ctx, "SELECT coalesce("+limit.SQL+", 0)").Scan(&most); err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	if most != e.MaxPayload {
		r.warn("set the same MAX_PAYLOAD for all workers", "MAX_PAYLOAD is %d bytes here, and %d in the database, by the worker that started last", e.MaxPayload, most)
	}
	return r.orOK("%d bytes, here and in the database", most)
}

// kindsLookedAt is how many jobs of each state of a queue are asked for their kind.
const kindsLookedAt = 500

// checkKinds finds jobs and schedules of kinds that neither this worker knows nor one that
// is up.
func (e *examination) checkKinds(ctx context.Context, s *admin.Status) []Finding {
	r := &report{check: "kinds"}
	known, ok := e.knownKinds(s.Instances)
	if !ok {
		return []Finding{{r.check, OK, "not judged: a worker of an older version is up, which doesn't say what it knows", ""}}
	}
	const wayOut = "deploy the worker that has the kind, or mend the name in the producer and delete the jobs; see the commands outbox, archive and cancel"
	if s.Outbox != nil {
		rows, err := outbox.Unknown(ctx, e.postgres.db, slices.Sorted(maps.Keys(known)), 0)
		if err != nil {
			r.findings = append(r.findings, notSeen(r.check, "", err))
		}
		for _, k := range rows {
			r.warn(wayOut, "%s in the outbox of the kind %s, which neither this program knows nor a worker that is up", jobsAre(k.Rows), k.Kind)
		}
		if s.Outbox.Rejected > 0 {
			r.warn("see the command outbox ls", "%s set aside in the outbox, because they can't become jobs", jobsAre(s.Outbox.Rejected))
		}
	}
	for _, q := range s.Queues {
		counts, err := asynqwire.CountKinds(ctx, e.redis.client, q.Name, kindsLookedAt)
		if err != nil {
			r.findings = append(r.findings, notSeen(r.check, "", err))
			break
		}
		for _, kind := range slices.Sorted(maps.Keys(counts)) {
			if !known[kind] {
				r.warn(wayOut, "%s on the queue %s of the kind %s, which neither this program knows nor a worker that is up", jobsAre(counts[kind]), q.Name, kind)
			}
		}
	}
	all := r.orOK("workers know those of all jobs")
	if e.postgres.db == nil || !e.postgres.tables {
		return all
	}
	return append(all, e.checkSchedules(ctx, known)...)
}

func (e *examination) checkSchedules(ctx context.Context, known map[string]bool) []Finding {
	r := &report{check: "schedules"}
	list, err := scheduler.List(ctx, e.postgres.db)
	if err != nil {
		return []Finding{notSeen(r.check, "", err)}
	}
	enabled := 0
	for _, entry := range list {
		if !entry.Enabled {
			continue
		}
		enabled++
		switch {
		case entry.Problem != "":
			r.warn("see the command schedule ls", "%s is not run: %s", entry.Name, entry.Problem)
		case !known[entry.Kind]:
			r.warn("deploy the worker that has the kind, or change the entry; see the command schedule", "%s is of the kind %s, which neither this program knows nor a worker that is up", entry.Name, entry.Kind)
		}
	}
	return r.orOK("%d enabled", enabled)
}
