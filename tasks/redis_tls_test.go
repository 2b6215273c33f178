package tasks_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/carpool-go/carpool/internal/servers"
	"github.com/carpool-go/carpool/internal/startup"
	"github.com/carpool-go/carpool/tasks"
)

// The server has a certificate of a private authority, and asks clients for one.
func TestOpenRedis_TakesAPrivateAuthorityAndACertificateOfItsOwn(t *testing.T) {
	t.Parallel()
	server, err := servers.StartRedis(t.Context(), servers.RedisConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	other, err := servers.StartRedis(t.Context(), servers.RedisConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Stop() })
	own := "&sslcert=" + server.CAFile() + "&sslkey=" + server.KeyFile()
	byAddress := server.TLSURL()
	for name, c := range map[string]struct{ url, says string }{
		"all that is needed":               {byAddress + "?sslrootcert=" + server.CAFile() + own, ""},
		"an authority that nobody trusts":  {byAddress + "?" + own[1:], "name the file of its authority in the URL: ?sslrootcert="},
		"another authority":                {byAddress + "?sslrootcert=" + other.CAFile() + own, "can't be trusted"},
		"no certificate":                   {byAddress + "?sslrootcert=" + server.CAFile(), "certificate"},
		"a certificate for another name":   {strings.Replace(byAddress, "127.0.0.1", "127.0.0.2", 1) + "?sslrootcert=" + server.CAFile() + own, "127.0.0.2"},
		"a certificate of another's signs": {byAddress + "?sslrootcert=" + server.CAFile() + "&sslcert=" + other.CAFile() + "&sslkey=" + other.KeyFile(), "certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rdb, err := tasks.OpenRedis(c.url)
			if err != nil {
				t.Fatal(err)
			}
			defer rdb.Close()
			err = rdb.Ping(t.Context()).Err()
			explained, _ := startup.Explain("REDIS_URL", c.url, err)
			switch {
			case c.says == "" && err != nil, c.says != "" && err == nil:
				t.Errorf("the answer is %v", err)
			case err != nil && (!strings.Contains(explained.Error(), c.says) || strings.Contains(explained.Error(), "sslkey=")):
				t.Errorf("it is said so: %v; want %q", explained, c.says)
			}
		})
	}
}

func TestOpenRedis_FilesOfCertificatesThatAreWrongAreNamed(t *testing.T) {
	t.Parallel()
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for url, says := range map[string]string{
		"rediss://u:hush@h?sslrootcert=/nowhere/ca.pem":                "sslrootcert: open /nowhere/ca.pem: no such file",
		"rediss://u:hush@h?sslrootcert=" + empty:                       "sslrootcert: the file has no certificate in PEM",
		"rediss://u:hush@h?sslcert=" + empty:                           "sslcert and sslkey go together",
		"rediss://u:hush@h?sslcert=" + empty + "&sslkey=" + empty:      "sslcert, sslkey: ",
		"redis://u:hush@h?sslrootcert=" + empty:                        `parameter "sslrootcert" is unknown`,
		"rediss-cluster://u:hush@h?sslrootcert=" + empty + "&sslmode=": `parameter "sslmode" is unknown`,
	} {
		if _, err := tasks.OpenRedis(url); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v, want %q", url, err, says)
		}
	}
}
