// Package shop is the tasks of a shop.
package shop

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/carpool-go/carpool/tasks"
)

// Tasks is the group of the shop's tasks. Its fields are their settings: a variable, and a
// flag of `shop run`, each.
type Tasks struct {
	TaxPercent int64 `env:"SHOP_TAX_PERCENT" default:"19" help:"Tax on an order, in percent of its net price."`
}

// Register adds the shop's tasks to s.
func (t *Tasks) Register(s *tasks.Set) { tasks.RegisterTx(s, t.book) }

// Check says what is wrong with the settings; the worker then doesn't start.
func (t *Tasks) Check() error {
	if t.TaxPercent < 0 || t.TaxPercent > 100 {
		return fmt.Errorf("SHOP_TAX_PERCENT is %d, which is not from 0 to 100; for example SHOP_TAX_PERCENT=19", t.TaxPercent)
	}
	return nil
}

// Order is to be booked.
type Order struct {
	Number   string `json:"number" doc:"the order's own" example:"A-17"`
	NetCents int64  `json:"net_cents" doc:"its net price" example:"1000"`
}

// Kind implements [tasks.Payload].
func (Order) Kind() string { return "order:book" }

// Options implements [tasks.Payload].
func (Order) Options() tasks.Options { return tasks.Options{Timeout: time.Minute, MaxRetry: 5} }

// Validate implements [tasks.Payload].
func (o Order) Validate() error {
	switch {
	case o.Number == "":
		return errors.New("number: must not be empty")
	case o.NetCents < 0:
		return errors.New("net_cents: must not be negative")
	}
	return nil
}

// Booked is the result of an order.
type Booked struct {
	TotalCents int64 `json:"total_cents"`
}

// book is a method of the group, so that it sees the settings. What it does in tx happens
// once, however often the job is delivered.
func (t *Tasks) book(ctx context.Context, _ *tasks.Job, tx pgx.Tx, o Order) (Booked, error) {
	tax := o.NetCents * t.TaxPercent / 100
	_, err := tx.Exec(ctx, "INSERT INTO orders (number, net_cents, tax_cents) VALUES ($1, $2, $3)", o.Number, o.NetCents, tax)
	return Booked{TotalCents: o.NetCents + tax}, err
}
