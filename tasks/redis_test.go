package tasks

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseRedisURL_TakesEverySchemeThatIsPromised(t *testing.T) {
	t.Parallel()
	type summary struct {
		Addrs              []string
		User, Password     string
		SentinelPassword   string
		Master, ServerName string
		DB                 int
		Cluster, TLS       bool
	}
	for url, want := range map[string]summary{
		"redis://localhost":               {Addrs: []string{"localhost:6379"}},
		"redis://cache:6380/3":            {Addrs: []string{"cache:6380"}, DB: 3},
		"redis://:p%40ss@cache":           {Addrs: []string{"cache:6379"}, Password: "p@ss"},
		"rediss://u:p@cache.example:6380": {Addrs: []string{"cache.example:6380"}, User: "u", Password: "p", TLS: true, ServerName: "cache.example"},
		"redis://[::1]:6380":              {Addrs: []string{"[::1]:6380"}},
		"redis-sentinel://:p@a,b:26380/1?master=m": {
			Addrs: []string{"a:26379", "b:26380"}, Password: "p", SentinelPassword: "p", Master: "m", DB: 1,
		},
		"redis-cluster://a:7000,b:7001":       {Addrs: []string{"a:7000", "b:7001"}, Cluster: true},
		"rediss-cluster://u:p@a:7000":         {Addrs: []string{"a:7000"}, User: "u", Password: "p", Cluster: true, TLS: true},
		"rediss-sentinel://a:1,b:2/?master=x": {Addrs: []string{"a:1", "b:2"}, Master: "x", TLS: true},
	} {
		o, err := parseRedisURL(url)
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		got := summary{
			Addrs: o.Addrs, User: o.Username, Password: o.Password, SentinelPassword: o.SentinelPassword,
			Master: o.MasterName, DB: o.DB, Cluster: o.IsClusterMode, TLS: o.TLSConfig != nil,
		}
		if o.TLSConfig != nil {
			got.ServerName = o.TLSConfig.ServerName
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", url, diff)
		}
	}
}

func TestOpenRedis_WrongURLsAreNamedWithoutTheirPassword(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"":                              "it has no scheme",
		"localhost:6379":                "it has no scheme",
		"http://hush@h":                 `scheme "http" is unknown`,
		"redis-foo://h":                 `scheme "redis-foo" is unknown`,
		"redis://":                      "it names no host",
		"redis://u:hush@":               "it names no host",
		"redis://u:hush@a,b":            "it names several hosts",
		"redis://u:hu%sh@h":             "it can't be parsed",
		"redis://u:hush/x@h:1":          "",
		"redis://u:hush@h:port":         "a host or port in it is wrong",
		"redis://u:hush@h/zero":         "the path must be the number of a database",
		"redis://u:hush@h/0?hush=1":     "is unknown",
		"redis-sentinel://u:hush@h":     "redis-sentinel needs ?master=",
		"redis-cluster://u:hush@h/2":    "a cluster has only database 0",
		"redis://u:hush@h/0?master=abc": `parameter "master" is unknown`,
	} {
		_, err := OpenRedis(url)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q in it", url, err, want)
			continue
		}
		if strings.Contains(err.Error(), "hush") && !strings.Contains(url, "?hush") {
			t.Errorf("%s: the error shows the password: %v", url, err)
		}
	}
}

func FuzzOpenRedis_NeverPanics(f *testing.F) {
	f.Add("redis-sentinel://u:p@a,b:1/2?master=m")
	f.Add("rediss://[::1%25eth0]:6380")
	f.Fuzz(func(t *testing.T, url string) {
		if o, err := parseRedisURL(url); err == nil && len(o.Addrs) == 0 {
			t.Errorf("%q: no address and no error", url)
		}
	})
}
