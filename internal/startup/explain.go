package startup

import (
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"syscall"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/carpool-go/carpool/dbpool"
	"github.com/carpool-go/carpool/internal/sentinel"
)

// Explain returns an error of a server as it is shown to whoever runs the program: in one
// line that begins with the variable that names the server, says what is wrong with it, and
// names the way out where there is one. It wraps err. rawURL is the server's; of it only
// hosts, the role and the name of the database are shown.
//
// ok is false for an error that says nothing of how the server can be used, such as the
// answer to a wrong statement, and for nil. That is returned as it is.
func Explain(variable, rawURL string, err error) (explained error, ok bool) {
	if e, ok := errors.AsType[*explanation](err); ok {
		return e, true
	}
	f := faultOf(rawURL, err)
	if f == nil {
		return err, false
	}
	text := variable + ": " + f.what
	if f.err != nil {
		text += ": " + oneLine(f.err.Error())
	}
	if said := oneLine(err.Error()); !f.forGood && strings.HasPrefix(said, variable+": ") {
		text = said // it says what was tried
	}
	if f.wayOut != "" {
		text += "; " + f.wayOut
	}
	return &explanation{text, err}, true
}

// explanation is an error with a text of its own.
type explanation struct {
	text string
	err  error
}

func (e *explanation) Error() string { return e.text }
func (e *explanation) Unwrap() error { return e.err }

// fault is what is wrong with a server.
type fault struct {
	what   string
	err    error // the server's own, of those that the whole error wraps; nil if what says it all
	wayOut string
	// forGood is true for a fault that no waiting mends.
	forGood bool
}

// faultOf returns what is wrong with the server, nil if err says nothing of it.
func faultOf(rawURL string, err error) *fault {
	if err == nil {
		return nil
	}
	var f *fault
	if strings.HasPrefix(rawURL, "redis") {
		f = redisFault(rawURL, err)
	} else {
		f = postgresFault(rawURL, err)
	}
	// With TLS 1.3 a server hears of the client's certificate when the client believes the
	// handshake to be over. What it says of it may be lost with the connection.
	isCutOff := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	if f != nil && f.wayOut == "" && isCutOff && strings.Contains(rawURL, "sslcert=") {
		f.wayOut = "a server that refuses the certificate of sslcert may cut the connection off like this"
	}
	return f
}

const refusedLogin = "the server refuses this user or password"

func redisFault(rawURL string, err error) *fault {
	at := hosts(rawURL)
	reply, answered := errors.AsType[redis.Error](err)
	noMaster, bySentinel := errors.AsType[*sentinel.Error](err)
	if f := redisCertificateFault(rawURL, err); f != nil && !answered {
		return f
	}
	switch {
	case bySentinel && (!answered || errors.Is(err, redis.Nil)):
		return &fault{what: noMaster.Error()}
	case answered && errors.Is(err, redis.Nil): // a mere key that isn't there
		return nil
	case redis.HasErrorPrefix(err, "WRONGPASS"):
		return &fault{refusedLogin, reply, "", true}
	case redis.HasErrorPrefix(err, "NOAUTH"):
		return &fault{refusedLogin, reply, "the URL needs the password: redis://:password@" + at, true}
	case redis.HasErrorPrefix(err, "NOPERM"):
		return &fault{"the server forbids this user a command", reply, "its ACL must allow all commands that a queue needs: ACL SETUSER … +@all ~* &*", true}
	case redis.HasErrorPrefix(err, "DB index"):
		return &fault{"the server has no database of the number that the URL ends with", reply, "", true}
	case answered:
		for _, prefix := range []string{"LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "OOM", "MISCONF", "NOREPLICAS"} {
			if redis.HasErrorPrefix(err, prefix) {
				return &fault{"Redis at " + at + " can't serve now", reply, "", false}
			}
		}
		return nil
	case strings.Contains(rawURL, "-sentinel://"):
		return &fault{"Redis cannot be reached at the master that the Sentinels at " + at + " name", err, "", false}
	}
	return &fault{"Redis at " + at + " cannot be reached", err, "", false}
}

// redisCertificateFault is certificateFault for Redis and for its Sentinels.
func redisCertificateFault(rawURL string, err error) *fault {
	at := hosts(rawURL)
	if noMaster, ok := errors.AsType[*sentinel.Error](err); ok {
		var f *fault
		for _, err := range noMaster.Errs {
			if f = certificateFault("the Sentinels at "+at, err); f == nil {
				return nil // this one may name the master when it is back
			}
		}
		return f
	}
	if strings.Contains(rawURL, "-sentinel://") {
		return certificateFault("the master that the Sentinels at "+at+" name", err)
	}
	return certificateFault("Redis at "+at, err)
}

// certificateFault is what is wrong with the certificate of a server, or with what a server
// has been shown by us; nil if err is of something else.
func certificateFault(server string, err error) *fault {
	if e, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return &fault{"the certificate of " + server + " can't be trusted", e, "name the file of its authority in the URL: ?sslrootcert=/path/to/ca.pem", true}
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		f := &fault{"the certificate of " + server + " is not valid", e, "", true}
		if e.Reason == x509.Expired {
			f.wayOut = "renew it, unless this machine's clock is wrong"
		}
		return f
	}
	if e, ok := errors.AsType[x509.HostnameError](err); ok {
		return &fault{"the certificate of " + server + " is for another name", e, "the URL must have a name or address that is in the certificate", true}
	}
	// The server has refused the handshake, and says why by TLS' own means.
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" {
		what, wayOut := "this client's certificate is refused by "+server, "sslcert in the URL must name one that is valid and of an authority that the server trusts"
		switch {
		case strings.Contains(e.Err.Error(), "certificate required"):
			what, wayOut = "a certificate is demanded by "+server, showCertificate
		case !strings.Contains(e.Err.Error(), "certificate"):
			return nil
		}
		return &fault{what, e.Err, wayOut, true}
	}
	return nil
}

// showCertificate is the way out where a server demands a certificate of its clients.
const showCertificate = "name one and its key in the URL: sslcert=/path/to/client.crt&sslkey=/path/to/client.key"

func postgresFault(rawURL string, err error) *fault {
	connect, connecting := errors.AsType[*pgconn.ConnectError](err)
	e, answered := errors.AsType[*pgconn.PgError](err)
	switch {
	case answered:
		if f := postgresRefusal(rawURL, e, connecting); f != nil {
			return f
		}
		if connecting {
			return &fault{"Postgres takes no connection", connect, "", false}
		}
	case connecting:
		if f := certificateFault("Postgres", err); f != nil {
			f.forGood = !hasSeveralHosts(rawURL) // another one may be the primary when it is back
			return f
		}
		return &fault{"Postgres cannot be reached", connect, "", false}
	case dbpool.IsAway(err):
		return &fault{"Postgres cannot be reached", err, "", false}
	}
	return nil
}

// postgresRefusal is a fault that no waiting mends; nil if e is none. Whether a role is
// missing, or just not let in, is known by the function in Postgres that says so, because
// the text of a message may be in any language.
func postgresRefusal(rawURL string, e *pgconn.PgError, connecting bool) *fault {
	var role, database string
	showsNone := false // over TLS
	if cfg, err := pgx.ParseConfig(rawURL); err == nil {
		role, database = cfg.User, cfg.Database
		showsNone = cfg.TLSConfig != nil && len(cfg.TLSConfig.Certificates) == 0
	}
	quotedRole, quotedDatabase := pgx.Identifier{role}.Sanitize(), pgx.Identifier{database}.Sanitize()
	f := &fault{err: e, forGood: true}
	switch e.Code {
	case pgerrcode.InvalidPassword:
		f.what = refusedLogin
	case pgerrcode.InvalidAuthorizationSpecification:
		f.what = refusedLogin
		switch {
		case e.Routine == "ClientAuthentication" && showsNone && !strings.Contains(e.Message, "pg_hba.conf"): // which is in its other messages
			f.what, f.wayOut = "a certificate is demanded by Postgres", showCertificate
		case e.Routine == "InitializeSessionUserId":
			f.wayOut = "createuser " + role + " makes the role; ALTER ROLE " + quotedRole + " LOGIN lets one in that there is"
		}
	case pgerrcode.InvalidCatalogName:
		f.what, f.wayOut = "the server has no such database", "make it with: createdb "+database
	case pgerrcode.InsufficientPrivilege:
		f.what = "the role " + role + " lacks a privilege"
		switch {
		case connecting && e.Routine == "CheckMyDatabase":
			f.wayOut = "GRANT CONNECT ON DATABASE " + quotedDatabase + " TO " + quotedRole
		case connecting:
			f.what, f.wayOut = "the server doesn't take a parameter of the URL", "take it out of the URL"
		case strings.HasPrefix(e.Message, "permission denied for database"):
			f.wayOut = "GRANT CREATE ON DATABASE " + quotedDatabase + " TO " + quotedRole
		default:
			f.wayOut = "migrate needs the owner of the schema carpool; for the rest the owner grants: " +
				"GRANT USAGE ON SCHEMA carpool TO " + quotedRole +
				"; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA carpool TO " + quotedRole +
				"; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA carpool TO " + quotedRole
		}
	case pgerrcode.UndefinedObject, pgerrcode.InvalidParameterValue, pgerrcode.CantChangeRuntimeParam:
		if !connecting {
			return nil
		}
		f.what, f.wayOut = "the server doesn't take a parameter of the URL", "take it out of the URL"
	case pgerrcode.ProtocolViolation:
		if !strings.HasPrefix(e.Message, "unsupported startup parameter") { // PgBouncer's
			return nil
		}
		f.what, f.wayOut = "the server doesn't take a parameter of the URL", "take it out of the URL"
	default:
		return nil
	}
	return f
}

// hasSeveralHosts reports whether a URL of Postgres names more than one server.
func hasSeveralHosts(rawURL string) bool {
	cfg, err := pgx.ParseConfig(rawURL)
	return err == nil && slices.ContainsFunc(cfg.Fallbacks, func(f *pgconn.FallbackConfig) bool {
		return f.Host != cfg.Host || f.Port != cfg.Port
	})
}

// hosts are those of a URL of Redis, with their ports.
func hosts(rawURL string) string {
	scheme, rest, _ := strings.Cut(rawURL, "://")
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		rest = rest[:end]
	}
	port := "6379"
	if strings.HasSuffix(scheme, "-sentinel") {
		port = "26379"
	}
	list := strings.Split(rest[strings.LastIndexByte(rest, '@')+1:], ",")
	for i, host := range list {
		if u, err := url.Parse("//" + host); err == nil && u.Port() == "" {
			list[i] = net.JoinHostPort(u.Hostname(), port)
		}
	}
	return strings.Join(list, ", ")
}

// oneLine is the text of an error in one line, without the lines that say the same again:
// a driver tries each address of a host, with TLS and without, and tells of each attempt.
func oneLine(text string) string {
	const refusedTLS = "tls error: server refused TLS connection" // then it is tried without
	var kept []string
	lines := strings.Split(text, "\n")
	said := make(map[string]bool)
	for i, line := range lines {
		line = strings.TrimSpace(line)
		if line == "" || said[line] || strings.HasSuffix(line, refusedTLS) && i < len(lines)-1 {
			continue
		}
		said[line] = true
		kept = append(kept, line)
	}
	text = strings.Join(kept, "; ")
	return strings.Replace(text, ":; ", ": ", 1) // what ends with a colon heads the others
}
