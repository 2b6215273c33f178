package webhook_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/internal/testservers"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
	"github.com/carpool-go/carpool/tasks/taskstest"
	"github.com/carpool-go/carpool/tasks/webhook"
)

const (
	webhookSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	// webhookJob is made on 2025-01-02 at 03:04:05.678 UTC.
	webhookJob = "019424f8-632e-7000-8000-000000000000"
)

// webhooks delivers to a receiver on 127.0.0.1.
type webhooks struct {
	*taskstest.Kit
	webhook.Deliverer
	log *testservers.Log
}

func newWebhooks(t *testing.T) *webhooks {
	t.Helper()
	kit := taskstest.New(t)
	kit.OutboundAllow = "127.0.0.1"
	return &webhooks{kit, webhook.Deliverer{Secret: webhookSecret}, new(testservers.Log)}
}

// receiver answers on 127.0.0.1 until the test ends.
func receiver(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s
}

func (w *webhooks) payload(url string) webhook.Deliver {
	return webhook.Deliver{URL: url, Event: "order.paid", Body: json.RawMessage(`{"order":17}`)}
}

// attempt makes one attempt of the job webhookJob.
func (w *webhooks) attempt(ctx context.Context, n int, p webhook.Deliver) (webhook.Result, error) {
	return w.attemptOf(ctx, webhookJob, n, p)
}

// attemptOf makes one attempt of a job.
func (w *webhooks) attemptOf(ctx context.Context, id string, n int, p webhook.Deliver) (webhook.Result, error) {
	guard, err := outbound.New(w.OutboundAllow)
	if err != nil {
		return webhook.Result{}, err
	}
	return w.Handle(outbound.NewContext(ctx, guard), &tasks.Job{
		ID: id, Kind: p.Kind(), Queue: "default", Attempt: n, MaxRetry: 10,
		DB: w.DB, Client: w.Client, Log: slog.New(slog.NewTextHandler(w.log, nil)),
	}, p)
}

// delivery is a row of carpool.webhook_deliveries.
type delivery struct {
	JobID, URL, Event string
	Attempt           int
	Status            *int
	Error             *string
	TookMs            int
	DeliveredAt       time.Time
}

func (w *webhooks) deliveries(t testing.TB) []delivery {
	t.Helper()
	rows, err := w.DB.Query(t.Context(), `
		SELECT job_id, url, event, attempt, status, error, took_ms, delivered_at FROM carpool.webhook_deliveries ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[delivery])
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// lastAttempt says what the newest row has: "status error".
func (w *webhooks) lastAttempt(t testing.TB) string {
	t.Helper()
	all := w.deliveries(t)
	if len(all) == 0 {
		return "no row"
	}
	d := all[len(all)-1]
	status, text := "null", "null"
	if d.Status != nil {
		status = strconv.Itoa(*d.Status)
	}
	if d.Error != nil {
		text = *d.Error
	}
	return status + " " + text
}

func want[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// start runs f in a goroutine; its result is to be received.
func start(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func TestDeliver_SignsByTheStandardWebhooksConvention(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	var got *http.Request
	var body []byte
	server := receiver(t, func(rw http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body)
		rw.WriteHeader(http.StatusAccepted)
	})
	before := time.Now().Truncate(time.Second)
	p := w.payload(server.URL + "/hooks?token=s3cret")
	p.Body = json.RawMessage(`{"html": "<b>&amp;</b>", "number": 12345678901234567890.50}`)
	result, err := w.attempt(t.Context(), 3, p)
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, webhook.Result{Status: 202, Attempts: 3})
	want(t, "request", got.Method+" "+got.URL.String(), "POST /hooks?token=s3cret")
	want(t, "content type", got.Header.Get("Content-Type"), "application/json")
	want(t, "body", string(body), `{"type":"order.paid","timestamp":"2025-01-02T03:04:05.678Z","data":{"html":"<b>&amp;</b>","number":12345678901234567890.50}}`)

	want(t, "webhook-id", got.Header.Get("webhook-id"), webhookJob)
	seconds, err := strconv.ParseInt(got.Header.Get("webhook-timestamp"), 10, 64)
	if at := time.Unix(seconds, 0); err != nil || at.Before(before) || at.After(time.Now()) {
		t.Errorf("webhook-timestamp %q is not the attempt's time", got.Header.Get("webhook-timestamp"))
	}
	// The signature as the specification has it, without the library that made it.
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(webhookSecret, "whsec_"))
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%d.%s", webhookJob, seconds, body)
	want(t, "webhook-signature", got.Header.Get("webhook-signature"), "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))

	rows := w.deliveries(t)
	if len(rows) != 1 || rows[0].TookMs < 0 || rows[0].DeliveredAt.Before(before) {
		t.Fatalf("rows: %+v", rows)
	}
	status := 202
	want(t, "row", rows[0], delivery{
		JobID: webhookJob, URL: server.URL + "/hooks", Event: "order.paid", Attempt: 3, Status: &status,
		TookMs: rows[0].TookMs, DeliveredAt: rows[0].DeliveredAt,
	})
}

func TestDeliver_EveryAttemptHasTheSameIDAndBody(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	var sent []string
	server := receiver(t, func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		sent = append(sent, r.Header.Get("webhook-id")+" "+string(body))
		rw.WriteHeader(http.StatusServiceUnavailable)
	})
	for n := range 3 {
		if _, err := w.attempt(t.Context(), n+1, w.payload(server.URL)); err == nil {
			t.Fatal("a 503 is no error")
		}
	}
	server.Close() // so that the handlers have ended
	if len(sent) != 3 || sent[0] != sent[1] || sent[1] != sent[2] {
		t.Errorf("the attempts sent %q", sent)
	}
	var attempts []int
	for _, d := range w.deliveries(t) {
		attempts = append(attempts, d.Attempt)
	}
	want(t, "attempts with a row", attempts, []int{1, 2, 3})
}

// Jobs that asynq clients of other languages enqueue have ids of their own making.
func TestDeliver_AnIDThatIsNoHeaderIsItsProducersFault(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	var got []string // webhook-ids
	s := receiver(t, func(_ http.ResponseWriter, r *http.Request) { got = append(got, r.Header.Get("webhook-id")) })
	for _, id := range []string{"a\nb", "a\r\nwebhook-signature: v1,x", "a\tb", "\x7f", " a", "a ", "\u0085", "\u00a0a"} {
		_, err := w.attemptOf(t.Context(), id, 1, w.payload(s.URL))
		if err == nil || !tasks.IsPermanent(err) || !strings.HasPrefix(err.Error(), "the job's id can't be sent as the header webhook-id: ") {
			t.Errorf("%q: %v", id, err)
		}
	}
	if len(got) > 0 || len(w.deliveries(t)) > 0 {
		t.Errorf("the receiver got %q; rows %v", got, w.deliveries(t))
	}
	for _, id := range []string{"order 17: \"paid\"", "größe"} {
		if _, err := w.attemptOf(t.Context(), id, 1, w.payload(s.URL)); err != nil {
			t.Errorf("%q: %v", id, err)
		}
		want(t, "webhook-id", got[len(got)-1], id)
	}
}

func TestDeliver_NoTimestampIsMadeUp(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	bodies := make(chan string, 1)
	server := receiver(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies <- string(body)
	})
	// taskstest's ids are random.
	if _, err := taskstest.Run(t, w.Kit, w.Handle, w.payload(server.URL)); err != nil {
		t.Fatal(err)
	}
	want(t, "body", <-bodies, `{"type":"order.paid","data":{"order":17}}`)
}

func TestDeliver_TheAnswerDecides(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(rw http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.URL.Path[1:])
		rw.Header().Set("Location", "/200")
		rw.WriteHeader(code)
		_, _ = io.WriteString(rw, "s3cret")
	})
	const (
		done      = "done"
		retried   = "retried"
		permanent = "permanent"
	)
	for code, wanted := range map[int]string{
		200: done, 201: done, 202: done, 204: done, 299: done,
		300: permanent, 301: permanent, 302: permanent, 303: permanent, 304: permanent, 307: permanent, 308: permanent,
		400: permanent, 401: permanent, 403: permanent, 404: permanent, 405: permanent, 409: permanent, 410: permanent,
		413: permanent, 422: permanent, 451: permanent,
		408: retried, 425: retried, 429: retried,
		500: retried, 501: retried, 502: retried, 503: retried, 504: retried, 529: retried, 599: retried,
		600: permanent, 999: permanent,
	} {
		_, err := w.attempt(t.Context(), 1, w.payload(server.URL+"/"+strconv.Itoa(code)))
		got := done
		switch {
		case tasks.IsPermanent(err):
			got = permanent
		case err != nil:
			got = retried
		}
		if got != wanted {
			t.Errorf("%d: %s, want %s (%v)", code, got, wanted, err)
		}
		if _, delayed := tasks.RetryDelay(err); delayed {
			t.Errorf("%d without Retry-After: the backoff is not used", code)
		}
		row := w.lastAttempt(t)
		if err == nil {
			want(t, "row", row, fmt.Sprintf("%d null", code))
			continue
		}
		want(t, "row", row, fmt.Sprintf("%d %v", code, err))
		if text := err.Error(); !strings.Contains(text, strings.TrimSpace(fmt.Sprintf("it answered %d %s", code, http.StatusText(code)))) ||
			strings.Contains(text, "s3cret") || strings.Contains(text, "redirects are not followed") != (code >= 300 && code <= 399) {
			t.Errorf("%d: error %q", code, text)
		}
	}
}

func TestDeliver_KeepsToRetryAfter(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Retry-After", r.URL.Query().Get("after"))
		code, _ := strconv.Atoi(r.URL.Path[1:])
		rw.WriteHeader(code)
	})
	at := time.Now().Add(90 * time.Minute).UTC().Format(http.TimeFormat)
	for _, tc := range []struct {
		code      int
		after     string
		from, to  time.Duration
		permanent bool
	}{
		{code: 429, after: "120", from: 2 * time.Minute, to: 2 * time.Minute},
		{code: 503, after: "120", from: 2 * time.Minute, to: 2 * time.Minute},
		{code: 500, after: "7", from: 7 * time.Second, to: 7 * time.Second},
		{code: 408, after: "7", from: 7 * time.Second, to: 7 * time.Second},
		{code: 425, after: "7", from: 7 * time.Second, to: 7 * time.Second},
		{code: 429, after: strings.ReplaceAll(at, " ", "+"), from: 80 * time.Minute, to: 90 * time.Minute},
		{code: 429, after: "100000000", from: 24 * time.Hour, to: 24 * time.Hour},
		{code: 429, after: "0"},
		{code: 429, after: "soon"},
		{code: 404, after: "120", permanent: true},
	} {
		_, err := w.attempt(t.Context(), 1, w.payload(fmt.Sprintf("%s/%d?after=%s", server.URL, tc.code, tc.after)))
		delay, asked := tasks.RetryDelay(err)
		if err == nil || tasks.IsPermanent(err) != tc.permanent || asked != (tc.to > 0) || delay < tc.from || delay > tc.to {
			t.Errorf("%d with Retry-After %s: delay %s, permanent %t (%v)", tc.code, tc.after, delay, tasks.IsPermanent(err), err)
		}
	}
}

func TestDeliver_FollowsNoRedirect(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	elsewhere := receiver(t, func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") })
	server := receiver(t, func(rw http.ResponseWriter, r *http.Request) {
		http.Redirect(rw, r, elsewhere.URL+"/s3cret", http.StatusPermanentRedirect)
	})
	if _, err := w.attempt(t.Context(), 1, w.payload(server.URL)); !tasks.IsPermanent(err) || strings.Contains(err.Error(), "s3cret") {
		t.Error(err)
	}
}

func TestDeliver_HoldsNoConnectionWhileItWaits(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	arrived, proceed := make(chan struct{}), make(chan struct{})
	server := receiver(t, func(http.ResponseWriter, *http.Request) {
		close(arrived)
		<-proceed
	})
	done := start(func() error { _, err := w.attempt(t.Context(), 1, w.payload(server.URL)); return err })
	<-arrived
	want(t, "connections checked out", w.DB.Stats().CheckedOut, 0)
	want(t, "row", w.lastAttempt(t), "null under way, or its end could not be recorded")
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want(t, "row", w.lastAttempt(t), "200 null")
}

func TestDeliver_DoesNotWaitForEver(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	release := make(chan struct{})
	silent := receiver(t, func(http.ResponseWriter, *http.Request) { <-release })
	t.Cleanup(func() { close(release) }) // before the server is closed, which waits for the handlers
	w.Timeout = 50 * time.Millisecond
	_, err := w.attempt(t.Context(), 1, w.payload(silent.URL+"/s3cret?token=s3cret"))
	if err == nil || tasks.IsPermanent(err) || !strings.Contains(err.Error(), "it did not answer within 50ms") {
		t.Error(err)
	}
	want(t, "row", w.lastAttempt(t), "null "+err.Error())
}

// A worker that stops ends the context; what is known of the attempt is recorded all the same.
func TestDeliver_IsRecordedWhenTheWorkerStops(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	arrived, release := make(chan struct{}), make(chan struct{})
	silent := receiver(t, func(http.ResponseWriter, *http.Request) {
		close(arrived)
		<-release
	})
	t.Cleanup(func() { close(release) })
	ctx, stop := context.WithCancelCause(t.Context())
	done := start(func() error { _, err := w.attempt(ctx, 1, w.payload(silent.URL)); return err })
	<-arrived
	stopping := errors.New("the worker is stopping")
	stop(stopping)
	err := <-done
	if !errors.Is(err, stopping) || tasks.IsPermanent(err) {
		t.Error(err)
	}
	want(t, "row", w.lastAttempt(t), "null "+err.Error())
}

func TestDeliver_WhatAnEndlessAnswerSaysIsNotRead(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(rw http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := rw.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	result, err := w.attempt(t.Context(), 1, w.payload(server.URL))
	if err != nil || result.Status != 200 {
		t.Error(result, err)
	}
}

func TestDeliver_NetworkErrorsAreRetriedAndShowNoSecrets(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	gone := httptest.NewServer(nil)
	gone.Close()
	dropped := receiver(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	for base, wanted := range map[string]string{
		gone.URL:    "connection refused",
		dropped.URL: "closed the connection before it had answered",
		// Says what it was told, as a misdirected webhook may find.
		"http://" + echo(t): "the server's answer is not valid HTTP",
	} {
		host := strings.TrimPrefix(base, "http://")
		_, err := w.attempt(t.Context(), 1, w.payload("http://user:s3cret@"+host+"/hooks?token=s3cret#s3cret"))
		if err == nil || tasks.IsPermanent(err) || !strings.HasPrefix(err.Error(), "webhook to "+host+": ") || !strings.Contains(err.Error(), wanted) {
			t.Errorf("%s: %v, want %q", base, err, wanted)
			continue
		}
		rows := w.deliveries(t)
		last := rows[len(rows)-1]
		want(t, "URL in the row", last.URL, base+"/hooks")
		want(t, "row", w.lastAttempt(t), "null "+err.Error())
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("error %q shows what is secret in the URL", err)
		}
	}
	_, err := w.attempt(t.Context(), 1, w.payload("http://"+strings.Repeat("x", 5000)+".invalid"))
	if err == nil || len(err.Error()) > 500 || !strings.Contains(err.Error(), "xx…: the host's name can't be resolved") {
		t.Errorf("a host that is too long: %.600v", err)
	}
}

// echo listens on 127.0.0.1 and says back the first it hears of each caller.
func echo(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 4096)
			n, _ := conn.Read(buf)
			_, _ = conn.Write(buf[:n])
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

func TestDeliver_CallsPublicAddressesOnly(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(http.ResponseWriter, *http.Request) { t.Error("it was called") })
	w.OutboundAllow = ""
	for _, url := range []string{server.URL, strings.Replace(server.URL, "127.0.0.1", "localhost", 1), "http://169.254.169.254/s3cret", "http://[fd00:ec2::254]/"} {
		_, err := w.attempt(t.Context(), 1, w.payload(url))
		if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), "OUTBOUND_ALLOW") || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", url, err)
			continue
		}
		want(t, "row", w.lastAttempt(t), "null "+err.Error())
	}
}

func TestDeliver_NothingIsSentThatLeavesNoTrace(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(http.ResponseWriter, *http.Request) { t.Error("it was sent") })
	if _, err := w.DB.Exec(t.Context(), "DROP TABLE carpool.webhook_deliveries"); err != nil {
		t.Fatal(err)
	}
	_, err := w.attempt(t.Context(), 1, w.payload(server.URL))
	if err == nil || tasks.IsPermanent(err) || !strings.Contains(err.Error(), "record the attempt") {
		t.Error(err)
	}
}

func TestDeliver_IsNotSentAgainBecauseItsEndCouldNotBeRecorded(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(http.ResponseWriter, *http.Request) {
		if _, err := w.DB.Exec(t.Context(), "DROP TABLE carpool.webhook_deliveries"); err != nil {
			t.Error(err)
		}
	})
	result, err := w.attempt(t.Context(), 1, w.payload(server.URL))
	if err != nil {
		t.Fatal(err)
	}
	want(t, "result", result, webhook.Result{Status: 200, Attempts: 1})
	if text := w.log.String(); !strings.Contains(text, "level=WARN") || !strings.Contains(text, "could not be recorded") || !strings.Contains(text, "status=200") {
		t.Errorf("the log says nothing of it:\n%s", text)
	}
}

func TestDeliver_ARecordSurvivesAConnectionThatBreaks(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(http.ResponseWriter, *http.Request) {
		_, err := w.DB.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		if err != nil {
			t.Error(err)
		}
	})
	if _, err := w.attempt(t.Context(), 1, w.payload(server.URL)); err != nil {
		t.Fatal(err)
	}
	want(t, "row", w.lastAttempt(t), "200 null")
}

func TestDeliver_NeedsASecret(t *testing.T) {
	t.Parallel()
	w := newWebhooks(t)
	server := receiver(t, func(http.ResponseWriter, *http.Request) { t.Error("it was sent") })
	for secret, wanted := range map[string]string{
		"":                       "set WEBHOOK_SECRET",
		"whsec_hush!":            "WEBHOOK_SECRET is wrong: it must be whsec_ and base64",
		"whsec_aHVzaA==":         "WEBHOOK_SECRET is wrong: it has 4 bytes, not 24 to 64",
		strings.Repeat("A", 120): "WEBHOOK_SECRET is wrong: it has 90 bytes, not 24 to 64",
	} {
		w.Secret = secret
		_, err := w.attempt(t.Context(), 1, w.payload(server.URL))
		if !tasks.IsPermanent(err) || !strings.Contains(err.Error(), wanted) || strings.Contains(err.Error(), "hush") {
			t.Errorf("secret %q: %v, want %q", secret, err, wanted)
		}
	}
	want(t, "rows", w.deliveries(t), []delivery{})
}

func TestValidateSecret(t *testing.T) {
	t.Parallel()
	for secret, valid := range map[string]bool{
		webhookSecret: true,
		strings.TrimPrefix(webhookSecret, "whsec_"):                                          true,
		base64.StdEncoding.EncodeToString(make([]byte, 32)):                                  true, // as Render's generateValue has it
		"whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 24)):                       true,
		"whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 64)):                       true,
		"whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 23)):                       false,
		"whsec_" + base64.StdEncoding.EncodeToString(make([]byte, 65)):                       false,
		"whsec_" + base64.RawStdEncoding.EncodeToString([]byte("s3cret-s3cret-s3cret-1234")): false,
		"": false, "whsec_": false, "whsec": false, "s3cret": false, webhookSecret + " " + webhookSecret: false,
	} {
		err := webhook.ValidateSecret(secret)
		if (err == nil) != valid {
			t.Errorf("%q: %v", secret, err)
		}
		if err != nil && (strings.Contains(err.Error(), "s3cret") || !strings.Contains(err.Error(), "openssl")) {
			t.Errorf("error %q", err)
		}
	}
}

func TestDeliver_Validate(t *testing.T) {
	t.Parallel()
	set := new(tasks.Set)
	tasks.Register(set, webhook.Deliverer{}.Handle)
	task, err := set.Lookup("webhook:deliver")
	if err != nil {
		t.Fatal(err)
	}
	for payload, wanted := range map[string]string{
		`{"url":"https://example.com/s3cret?a=b","event":"order.paid","body":{}}`:           "",
		`{"url":"http://user:pw@[2001:db8::1]:8080","event":"a","body":null}`:               "",
		`{"url":"HTTPS://example.com","event":"order:paid/v1_x-y","body":0}`:                "",
		`{"url":"https://example.com","event":"a","body":"text"}`:                           "",
		`{"url":"https://example.com","event":"a","body":[1, {"x": 1e400}]}`:                "",
		`{"url":"s3cret","event":"a","body":{}}`:                                            "url: must begin with",
		`{"url":"file:///s3cret","event":"a","body":{}}`:                                    "url: must begin with",
		`{"url":"https:///s3cret","event":"a","body":{}}`:                                   "url: must begin with",
		`{"url":"https://:80/s3cret","event":"a","body":{}}`:                                "url: must begin with",
		`{"url":"https:s3cret","event":"a","body":{}}`:                                      "url: must begin with",
		`{"url":"https://s3cret:s3cret@exa mple/","event":"a","body":{}}`:                   "url: must begin with",
		`{"event":"a","body":{}}`:                                                           "url: must begin with",
		`{"url":"https://example.com","body":{}}`:                                           "event: must be",
		`{"url":"https://example.com","event":"s3cret\n","body":{}}`:                        "event: must be",
		`{"url":"https://example.com","event":"` + strings.Repeat("a", 129) + `","body":1}`: "event: must be",
		`{"url":"https://example.com","event":"a"}`:                                         "body: is missing",
		`{"url":"https://example.com","event":"a","body":s3cret}`:                           "not valid JSON",
		`{"url":"https://example.com","event":"a","body":{},"s":1}`:                         "unknown field",
		`{"url":1,"event":"a","body":{}}`:                                                   "url: want string",
	} {
		_, err := task.Decode([]byte(payload))
		switch {
		case wanted == "" && err != nil, wanted != "" && (err == nil || !strings.Contains(err.Error(), wanted)):
			t.Errorf("%s: %v, want %q", payload, err, wanted)
		case err != nil && (strings.Contains(err.Error(), "s3cret") || !tasks.IsPermanent(err)):
			t.Errorf("%s: error %v", payload, err)
		}
	}
	p := webhook.Deliver{URL: "https://example.com", Event: "a", Body: json.RawMessage("{s3cret")}
	if err := p.Validate(); err == nil || err.Error() != "body: is not valid JSON" {
		t.Error(err)
	}
}
