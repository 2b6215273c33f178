package tasks

import "github.com/carpool-go/carpool/outbound"

// Config is what the built-in tasks need to know of the worker they run in.
// Its zero value works; the tasks that need more say so when they run.
type Config struct {
	// ImportDir is the folder below which csv:import may read files; ""
	// refuses them all.
	ImportDir string
	// WebhookSecret signs webhooks: "whsec_" and base64. "" refuses them all.
	WebhookSecret string
	// Outbound guards calls to the network; nil allows public addresses only.
	Outbound *outbound.Guard
}

// Builtin returns the tasks that every worker has. A new task is registered
// here, with one line.
func Builtin(cfg Config) *Set {
	s := new(Set)
	RegisterOnce(s, CSVImporter{ImportDir: cfg.ImportDir, Outbound: cfg.Outbound}.Handle)
	Register(s, WebhookDeliverer{Secret: cfg.WebhookSecret, Outbound: cfg.Outbound}.Handle)
	Register(s, HandleRowsPrune)
	Register(s, HandlePoolValidate)
	Register(s, HandlePrune)
	return s
}
