// Package webhook has the kind of job webhook:deliver, which delivers an event to a
// URL, signed by the convention of Standard Webhooks. It is for services that enqueue such
// jobs: [Deliver] is the payload, and [Result] what comes of it.
//
// Workers have the kind with the group of package builtin. A group of one's own registers
// [Deliverer.Handle] with [tasks.Register].
package webhook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/carpool-go/carpool/internal/asynqwire"
	"github.com/carpool-go/carpool/internal/pgtext"
	"github.com/carpool-go/carpool/outbound"
	"github.com/carpool-go/carpool/tasks"
)

// Deliver is the payload of webhook:deliver, which delivers an event to a URL, signed by
// the convention of https://www.standardwebhooks.com.
//
// What is sent is {"type": event, "timestamp": …, "data": body}, the same on
// every attempt. The timestamp is the time at which the job was enqueued, taken from the
// job's id; it is left out if the enqueuer chose the id. The header webhook-id is the
// job's id, by which a receiver knows what it had already; webhook-timestamp is the
// attempt's time.
type Deliver struct {
	// URL is where the event is sent: https://… or http://….
	URL string `json:"url" doc:"where to: https://… or http://…" example:"https://example.com/webhooks"`
	// Event says what happened, such as order.paid: 1 to 128 letters, digits, or _ . : / -.
	Event string `json:"event" doc:"what happened, such as order.paid" example:"order.paid"`
	// Body is the event's data, as JSON; null is data too.
	Body json.RawMessage `json:"body" doc:"the event's data" example:"{\"order\": 17}"`
}

// Kind returns "webhook:deliver".
func (Deliver) Kind() string { return "webhook:deliver" }

// Options returns 60 retries, which the worker's backoff spreads over about a day; a
// timeout of a minute for each attempt; and a retention of a day.
func (Deliver) Options() tasks.Options {
	return tasks.Options{MaxRetry: 60, Timeout: time.Minute, Retention: 24 * time.Hour, SQL: tasks.SQLOperators}
}

var eventName = regexp.MustCompile(`^[A-Za-z0-9_.:/-]{1,128}$`)

// Validate returns what is wrong with the form of the fields.
func (p Deliver) Validate() error {
	u, err := url.Parse(p.URL)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "" {
		return errors.New("url: must begin with https:// or http:// and name a host")
	}
	if !eventName.MatchString(p.Event) {
		return errors.New("event: must be 1 to 128 letters, digits, or _ . : / -")
	}
	if len(p.Body) == 0 {
		return errors.New("body: is missing; null is allowed")
	}
	if !json.Valid(p.Body) {
		return errors.New("body: is not valid JSON")
	}
	return nil
}

// ValidateSecret returns what is wrong with a secret, without showing it; nil for base64 of
// 24 to 64 bytes, with or without "whsec_" before it. It is for groups that register
// [Deliverer.Handle] with a setting of their own.
func ValidateSecret(secret string) error {
	_, err := secretKey(secret)
	return err
}

func secretKey(secret string) ([]byte, error) {
	const makeOne = "make one with: echo whsec_$(openssl rand -base64 32)"
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	switch {
	case err != nil:
		return nil, errors.New("it must be whsec_ and base64; " + makeOne)
	case len(key) < 24 || len(key) > 64: // as the specification of Standard Webhooks has it
		return nil, fmt.Errorf("it has %d bytes, not 24 to 64; %s", len(key), makeOne)
	}
	return key, nil
}

// Result is the result of webhook:deliver.
type Result struct {
	// Status is the HTTP status that the receiver answered with, from 200 to 299.
	Status int `json:"status"`
	// Attempts is how many attempts the delivery took.
	Attempts int `json:"attempts"`
}

// Deliverer runs webhook:deliver. It calls URLs that the worker lets jobs call (see
// [outbound.Client]).
type Deliverer struct {
	// Secret signs the webhooks, as [ValidateSecret] takes it; "" makes every delivery a
	// permanent error.
	Secret string
	// Timeout bounds one request; 0 means 30 s.
	Timeout time.Duration
}

const (
	defaultTimeout = 30 * time.Second
	// drainBytes is how much of an answer's body is read, in bytes, so that
	// the receiver can finish it. Nothing is done with it.
	drainBytes = 64 << 10
)

// Handle makes one attempt. It is a handler for [tasks.Register]: a receiver may get an
// event twice, with the same webhook-id.
//
// Each attempt has a row in carpool.webhook_deliveries, made before anything is sent and
// completed afterwards, so that all that is sent leaves a trace, whatever happens to the
// worker or the database. If a webhook has been sent and its row can't be completed, that
// is logged and the receiver's answer counts, because to send it again would be worse. No
// connection is held while the receiver is waited for.
//
// After an answer of 408, 425, 429 or 5xx, and without an answer, the job is tried again,
// at the time that Retry-After names, if any. The other answers, and an address that jobs
// may not call, are permanent errors.
func (d Deliverer) Handle(ctx context.Context, job *tasks.Job, p Deliver) (Result, error) {
	if d.Secret == "" {
		return Result{}, tasks.Permanent(errors.New("this worker has no secret to sign with; set WEBHOOK_SECRET"))
	}
	key, err := secretKey(d.Secret)
	if err != nil {
		return Result{}, tasks.Permanent(fmt.Errorf("WEBHOOK_SECRET is wrong: %w", err))
	}
	if !isHeader(job.ID) {
		return Result{}, tasks.Permanent(errors.New("the job's id can't be sent as the header webhook-id: " +
			"it has control characters, or begins or ends with a space; let its producer enqueue it under another"))
	}
	req, err := signedRequest(p, job.ID, key, time.Now())
	if err != nil {
		return Result{}, tasks.Permanent(err)
	}
	row, err := beginDelivery(ctx, job, p)
	if err != nil {
		return Result{}, err
	}
	began := time.Now()
	status, err := d.send(ctx, req)
	row.complete(ctx, status, err, time.Since(began))
	if err != nil {
		return Result{}, err
	}
	return Result{Status: status, Attempts: job.Attempt}, nil
}

// isHeader reports whether the receiver of an id as a header gets what was signed. Other
// producers than carpool's may give a job any id.
func isHeader(id string) bool {
	return !strings.ContainsFunc(id, unicode.IsControl) && strings.TrimSpace(id) == id
}

func signedRequest(p Deliver, id string, key []byte, now time.Time) (*http.Request, error) {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false) // the data goes out as it came in
	err := enc.Encode(struct {
		Type      string          `json:"type"`
		Timestamp time.Time       `json:"timestamp,omitzero"`
		Data      json.RawMessage `json:"data"`
	}{p.Event, madeAt(id), p.Body})
	if err != nil {
		return nil, errors.New("body: is not valid JSON")
	}
	body.Truncate(body.Len() - len("\n"))
	signer, err := standardwebhooks.NewWebhookRaw(key)
	if err != nil {
		return nil, fmt.Errorf("sign the webhook: %w", err)
	}
	signature, err := signer.Sign(id, now, body.Bytes())
	if err != nil {
		return nil, fmt.Errorf("sign the webhook: %w", err)
	}
	req, err := http.NewRequest(http.MethodPost, p.URL, &body)
	if err != nil {
		return nil, errors.New("url: can't be called") // the error repeats the URL
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "carpool")
	req.Header.Set(standardwebhooks.HeaderWebhookID, id)
	req.Header.Set(standardwebhooks.HeaderWebhookTimestamp, strconv.FormatInt(now.Unix(), 10))
	req.Header.Set(standardwebhooks.HeaderWebhookSignature, signature)
	return req, nil
}

// madeAt is the time in a job's id, which [tasks.Client] makes as UUIDs of version 7;
// zero for ids of others.
func madeAt(id string) time.Time {
	u, err := uuid.Parse(id)
	if err != nil || u.Version() != 7 {
		return time.Time{}
	}
	return time.Unix(u.Time().UnixTime()).UTC().Truncate(time.Millisecond)
}

// send makes the request. The status is 0 if there was no answer. The error
// shows nothing of the URL but its host, and is permanent if another try is of
// no use.
func (d Deliverer) send(ctx context.Context, req *http.Request) (status int, err error) {
	timeout := d.Timeout
	if timeout == 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("it did not answer within %s", timeout))
	defer cancel()
	host := pgtext.Cut(req.URL.Host, maxHost)
	client := outbound.Client(ctx)
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req.WithContext(ctx))
	if err != nil {
		return 0, noAnswer(ctx, host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.CopyN(io.Discard, resp.Body, drainBytes)
	return resp.StatusCode, answered(host, resp)
}

func noAnswer(ctx context.Context, host string, err error) error {
	err = outbound.Reason(err)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	_, blocked := errors.AsType[*outbound.BlockedError](err)
	err = fmt.Errorf("webhook to %s: %w", host, err)
	if blocked {
		return tasks.Permanent(err)
	}
	return err
}

// answered decides what the answer means for the job. An answer that asks
// for a later time is kept to; the others get the usual backoff.
func answered(host string, resp *http.Response) error {
	status := resp.StatusCode
	if status >= 200 && status <= 299 {
		return nil
	}
	err := fmt.Errorf("webhook to %s: it answered %s", host, strings.TrimSpace(fmt.Sprint(status, " ", http.StatusText(status))))
	switch {
	case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests,
		status >= 500 && status <= 599:
		if wait := retryAfter(resp.Header.Get("Retry-After"), time.Now()); wait > 0 {
			return tasks.RetryAfter(wait, err)
		}
		return err
	case status >= 300 && status <= 399:
		err = fmt.Errorf("%w; redirects are not followed", err)
	}
	return tasks.Permanent(err)
}

// retryAfterMost bounds what a receiver can ask for.
const retryAfterMost = 24 * time.Hour

// retryAfter reads a Retry-After header: seconds, or a date (RFC 9110, 10.2.3).
// It is 0 if there is none, or none that can be read, or its time has come.
func retryAfter(header string, now time.Time) time.Duration {
	header = strings.TrimSpace(header)
	if header != "" && strings.Trim(header, "0123456789") == "" {
		seconds, err := strconv.Atoi(header)
		if err != nil || seconds > int(retryAfterMost/time.Second) {
			return retryAfterMost // it is out of range
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(header)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), retryAfterMost)
}

// delivery is an attempt's row in carpool.webhook_deliveries.
type delivery struct {
	id  int64
	job *tasks.Job
}

// underWay is what a row says until the attempt's end is known.
const underWay = "under way, or its end could not be recorded"

func beginDelivery(ctx context.Context, job *tasks.Job, p Deliver) (*delivery, error) {
	d := &delivery{job: job}
	err := job.DB.QueryRow(ctx, `
		INSERT INTO carpool.webhook_deliveries (job_id, attempt, url, event, error, took_ms)
		VALUES ($1, $2, $3, $4, $5, 0) RETURNING id`,
		job.ID, job.Attempt, publicURL(p.URL), p.Event, underWay).Scan(&d.id)
	if err != nil {
		return nil, fmt.Errorf("record the attempt: %w", err)
	}
	return d, nil
}

// complete records the attempt's end, even if it is the job's end that came.
func (d *delivery) complete(ctx context.Context, status int, failed error, took time.Duration) {
	bound := 10 * time.Second
	if ctx.Err() != nil {
		bound = asynqwire.TimeoutGrace / 2 // what is left to wind up
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bound)
	defer cancel()
	var code *int
	if status != 0 {
		code = &status
	}
	var reason *string
	if failed != nil {
		text := pgtext.Cut(failed.Error(), maxReason)
		reason = &text
	}
	var err error
	// A second try, since a connection may break amid a statement; to do it twice is harmless.
	for range 2 {
		_, err = d.job.DB.Exec(ctx, `
			UPDATE carpool.webhook_deliveries SET status = $2, error = $3, took_ms = $4, delivered_at = now() WHERE id = $1`,
			d.id, code, reason, took.Milliseconds())
		if err == nil {
			return
		}
	}
	d.job.Log.Warn("the end of the webhook's attempt could not be recorded", "status", status, "row", d.id, "error", err)
}

// maxReason bounds what is recorded of an error, in bytes: a receiver may have had a part
// in its text.
const maxReason = 1000

// maxHost bounds what errors show of a host, in bytes. It is more than a host's name has.
const maxHost = 300

// publicURL is a URL without what may be secret in it.
func publicURL(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}
