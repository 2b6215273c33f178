package tasks

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/carpool-go/carpool/internal/sentinel"
)

const redisURLForms = `redis://[user:password@]host[:port][/db], rediss:// for TLS, ` +
	`redis-sentinel://[user:password@]host[:port][,host…][/db]?master=name, or redis-cluster://[user:password@]host[:port][,host…]`

// OpenRedis returns a client of the Redis at a URL, for [NewClient]. It connects when the
// client is first used, so a server that is away is no error; the caller closes the
// client.
//
// The schemes are redis, rediss (TLS), redis-sentinel (with ?master=) and redis-cluster;
// the latter two take several hosts, and rediss-sentinel and rediss-cluster use
// TLS. Sentinels are asked with the same user and password as the server, for each new
// connection; where none of them answers within three seconds, the command's error says so.
// With TLS a URL may name files in PEM as those of Postgres do: sslrootcert has the authorities
// to trust in place of the system's, sslcert and sslkey are what the client shows. The
// error of OpenRedis says what is wrong with the URL and never shows it, because it may hold a password.
func OpenRedis(rawURL string) (redis.UniversalClient, error) {
	opts, err := parseRedisURL(rawURL)
	if err != nil {
		return nil, fmt.Errorf("tasks: redis URL: %w; want %s", err, redisURLForms)
	}
	if opts.MasterName != "" {
		return sentinel.NewClient(opts), nil
	}
	if opts.IsClusterMode {
		cluster := opts.Cluster()
		cluster.ClusterStateReloadInterval = clusterReload
		return redis.NewClusterClient(cluster), nil
	}
	return redis.NewUniversalClient(opts), nil
}

// clusterReload is how old a client may let its picture of a cluster get. go-redis looks anew
// when a server sends it elsewhere, but not when one is gone, and by itself once a minute.
const clusterReload = 2 * time.Second

func parseRedisURL(rawURL string) (*redis.UniversalOptions, error) {
	scheme, _, ok := strings.Cut(rawURL, "://")
	if !ok {
		return nil, errors.New("it has no scheme")
	}
	// A list of hosts with ports is no valid authority to net/url: take the
	// hosts out before the rest is parsed.
	hosts, rest := cutHosts(rawURL[len(scheme)+len("://"):])
	u, err := url.Parse(scheme + "://" + rest)
	if err != nil {
		// The error of url.Parse repeats the URL.
		return nil, errors.New("it can't be parsed; special characters in the password must be %-encoded")
	}
	opts := &redis.UniversalOptions{
		Username:              u.User.Username(),
		ContextTimeoutEnabled: true, // a command ends with its context
		// What a hosted Redis offers for its own maintenance is not needed
		// here, and a plain one answers it with an error.
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	opts.Password, _ = u.User.Password()

	base, withTLS := strings.CutPrefix(scheme, "rediss")
	if !withTLS {
		if base, ok = strings.CutPrefix(scheme, "redis"); !ok {
			return nil, fmt.Errorf("scheme %.20q is unknown", scheme)
		}
	}
	port, several := "6379", true
	switch base {
	case "":
		several = false
	case "-cluster":
		opts.IsClusterMode = true
	case "-sentinel":
		port = "26379"
		opts.MasterName = u.Query().Get("master")
		if opts.MasterName == "" {
			return nil, errors.New("redis-sentinel needs ?master=, the name the sentinels watch")
		}
		opts.SentinelUsername, opts.SentinelPassword = opts.Username, opts.Password
	default:
		return nil, fmt.Errorf("scheme %.20q is unknown", scheme)
	}

	for host := range strings.SplitSeq(hosts, ",") {
		addr, err := hostPort(host, port)
		if err != nil {
			return nil, err
		}
		opts.Addrs = append(opts.Addrs, addr)
	}
	if len(opts.Addrs) > 1 && !several {
		return nil, errors.New("it names several hosts; only redis-sentinel and redis-cluster do")
	}
	if db := strings.Trim(u.Path, "/"); db != "" {
		opts.DB, err = strconv.Atoi(db)
		if err != nil || opts.DB < 0 {
			return nil, fmt.Errorf("the path must be the number of a database, such as /0")
		}
		if opts.IsClusterMode && opts.DB != 0 {
			return nil, errors.New("a cluster has only database 0")
		}
	}
	for name := range u.Query() {
		switch {
		case name == "master" && base == "-sentinel":
		case (name == "sslrootcert" || name == "sslcert" || name == "sslkey") && withTLS:
		default:
			return nil, fmt.Errorf("parameter %.40q is unknown", name)
		}
	}
	if withTLS {
		if opts.TLSConfig, err = tlsOf(u.Query()); err != nil {
			return nil, err
		}
		if !several { // else each host by its own name
			opts.TLSConfig.ServerName, _, _ = net.SplitHostPort(opts.Addrs[0])
		}
	}
	return opts, nil
}

// tlsOf reads the files of certificates that a URL's parameters name.
func tlsOf(params url.Values) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if file := params.Get("sslrootcert"); file != "" {
		authorities, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("sslrootcert: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(authorities) {
			return nil, errors.New("sslrootcert: the file has no certificate in PEM")
		}
	}
	cert, key := params.Get("sslcert"), params.Get("sslkey")
	switch {
	case (cert == "") != (key == ""):
		return nil, errors.New("sslcert and sslkey go together: the certificate that the client shows, and its key")
	case cert != "":
		own, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("sslcert, sslkey: %w", err)
		}
		cfg.Certificates = []tls.Certificate{own}
	}
	return cfg, nil
}

// cutHosts takes the hosts out of user:password@hosts/path?query and puts a
// single placeholder in their place.
func cutHosts(s string) (hosts, rest string) {
	end := len(s)
	if i := strings.IndexAny(s, "/?#"); i >= 0 {
		end = i
	}
	start := strings.LastIndexByte(s[:end], '@') + 1
	return s[start:end], s[:start] + "host" + s[end:]
}

func hostPort(s, defaultPort string) (string, error) {
	if s == "" {
		return "", errors.New("it names no host")
	}
	u, err := url.Parse("redis://" + s)
	if err != nil || u.Hostname() == "" {
		return "", errors.New("a host or port in it is wrong; special characters in the password must be %-encoded")
	}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}
