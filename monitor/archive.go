package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/carpool-go/carpool/admin"
	"github.com/carpool-go/carpool/tasks"
)

// maxRequest is how long a request's body may be, in bytes, as asynqmon has it.
const maxRequest = 1_000_000

// archive answers the requests of asynqmon's buttons that run jobs of the archive or delete
// one, as asynqmon would, by [admin.Admin.Retry] and [admin.Admin.Delete]. asynqmon's own
// way leaves the tries of a job that is run used up, and goes past its unique key.
type archive struct{ admin *admin.Admin }

// changeArchived leaves all other requests to pages.
func changeArchived(a *admin.Admin, pages http.Handler) http.Handler {
	archive := archive{a}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest, ok := strings.CutPrefix(r.URL.Path, "/api/queues/")
		queue, what, archived := strings.Cut(rest, "/archived_tasks")
		id, one := strings.CutSuffix(what, ":run")
		switch {
		case ok && archived && r.Method == http.MethodDelete && strings.HasPrefix(what, "/"):
			archive.deleteOne(w, r, queue, what[1:])
		case !ok || !archived || queue == "" || r.Method != http.MethodPost:
			pages.ServeHTTP(w, r)
		case what == ":run_all":
			archive.retryAll(w, r, queue)
		case what == ":batch_run":
			archive.retrySome(w, r, queue)
		case one && strings.HasPrefix(id, "/"):
			archive.retryOne(w, r, queue, id[1:])
		default:
			pages.ServeHTTP(w, r)
		}
	})
}

func (a archive) retry(ctx context.Context, queue, id string) error {
	job, err := a.admin.ArchivedJob(ctx, queue, id)
	if err != nil {
		return err
	}
	return a.admin.Retry(ctx, job)
}

func (a archive) retryOne(w http.ResponseWriter, r *http.Request, queue, id string) {
	err := a.retry(r.Context(), queue, id)
	_, held := errors.AsType[*tasks.DuplicateError](err)
	switch {
	case err == nil:
		w.WriteHeader(http.StatusNoContent)
	case errors.Is(err, admin.ErrNotArchived):
		http.Error(w, err.Error(), http.StatusNotFound)
	case errors.Is(err, tasks.ErrJobLost):
		http.Error(w, err.Error(), http.StatusGone)
	case held:
		http.Error(w, err.Error(), http.StatusConflict)
	default:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// deleteOne deletes also what is left of a job whose data is gone, which asynqmon doesn't find.
func (a archive) deleteOne(w http.ResponseWriter, r *http.Request, queue, id string) {
	job, err := a.admin.ArchivedJob(r.Context(), queue, id)
	if err == nil {
		err = a.admin.Delete(r.Context(), job)
	}
	switch {
	case err == nil:
		w.WriteHeader(http.StatusNoContent)
	case errors.Is(err, admin.ErrNotArchived):
		http.Error(w, err.Error(), http.StatusNotFound)
	default:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (a archive) retrySome(w http.ResponseWriter, r *http.Request, queue string) {
	var request struct {
		IDs []string `json:"task_ids"`
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&request); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer := struct {
		Pending []string `json:"pending_ids"`
		Failed  []string `json:"error_ids"`
	}{[]string{}, []string{}}
	for _, id := range request.IDs {
		if err := a.retry(r.Context(), queue, id); err != nil {
			answer.Failed = append(answer.Failed, id)
			continue
		}
		answer.Pending = append(answer.Pending, id)
	}
	writeJSON(w, answer)
}

// retryAll leaves those in the archive whose unique key another job holds, and those whose
// data is gone.
func (a archive) retryAll(w http.ResponseWriter, r *http.Request, queue string) {
	jobs, err := a.admin.Archived(r.Context(), admin.ArchiveFilter{Queue: queue})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer := struct {
		Moved int `json:"scheduled"`
	}{}
	for _, job := range jobs {
		err := a.admin.Retry(r.Context(), job)
		_, held := errors.AsType[*tasks.DuplicateError](err)
		switch {
		case err == nil:
			answer.Moved++
		case held, errors.Is(err, admin.ErrNotArchived), errors.Is(err, tasks.ErrJobLost):
		default:
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	writeJSON(w, answer)
}

func writeJSON(w http.ResponseWriter, answer any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the reader has gone
}
