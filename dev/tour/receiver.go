package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// receiver is the other side of a webhook: a small server that takes only what is signed by the Standard Webhooks
// convention. Whoever receives carpool's webhooks may take it as a model.
type receiver struct {
	url      string
	received chan delivery // one for each that was signed rightly
	server   *http.Server
	secret   []byte
}

// delivery is a webhook that was received.
type delivery struct {
	id   string // the job's
	body []byte
}

func startReceiver(secret string) (*receiver, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		return nil, fmt.Errorf("the webhook secret: %w", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start a receiver of webhooks: %w", err)
	}
	r := &receiver{url: "http://" + l.Addr().String() + "/hooks", received: make(chan delivery, 100), secret: key}
	r.server = &http.Server{Handler: http.HandlerFunc(r.receive), ReadTimeout: 10 * time.Second}
	go func() { _ = r.server.Serve(l) }() // ends with stop
	return r, nil
}

func (r *receiver) stop() error { return r.server.Close() }

func (r *receiver) receive(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, 1<<20))
	if err != nil {
		http.Error(w, "the body could not be read", http.StatusBadRequest)
		return
	}
	if err := r.verify(req.Header, body, time.Now()); err != nil {
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	select {
	case r.received <- delivery{id: req.Header.Get("webhook-id"), body: body}:
	default: // nobody looks at what comes after the tour
	}
	w.WriteHeader(http.StatusNoContent)
}

// tolerance is how old or young a webhook may be; older ones may be replays.
const tolerance = 5 * time.Minute

// verify checks a webhook's signature and age: https://www.standardwebhooks.com. What is signed is "id.timestamp.body".
func (r *receiver) verify(header http.Header, body []byte, now time.Time) error {
	id, timestamp := header.Get("webhook-id"), header.Get("webhook-timestamp")
	sent, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || id == "" {
		return errors.New("webhook-id or webhook-timestamp is missing")
	}
	if age := now.Sub(time.Unix(sent, 0)); age.Abs() > tolerance {
		return errors.New("webhook-timestamp is too far from now")
	}
	mac := hmac.New(sha256.New, r.secret)
	fmt.Fprintf(mac, "%s.%s.", id, timestamp)
	mac.Write(body)
	want := mac.Sum(nil)
	// There are several while a secret is being changed.
	for signature := range strings.FieldsSeq(header.Get("webhook-signature")) {
		got, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(signature, "v1,"))
		if err == nil && strings.HasPrefix(signature, "v1,") && hmac.Equal(got, want) {
			return nil
		}
	}
	return errors.New("webhook-signature is not ours")
}
