package tasks_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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
	misnamed, err := servers.StartRedis(t.Context(), servers.RedisConfig{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = misnamed.Stop() })
	if err := servers.WriteCertificate(misnamed.CAFile(), misnamed.KeyFile(), servers.Certificate{Name: "redis.example"}); err != nil {
		t.Fatal(err)
	}
	if err := misnamed.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	own := "&sslcert=" + server.CAFile() + "&sslkey=" + server.KeyFile()
	byAddress := server.TLSURL()
	for name, c := range map[string]struct{ url, says string }{
		"all that is needed":               {byAddress + "?sslrootcert=" + server.CAFile() + own, ""},
		"an authority that nobody trusts":  {byAddress + "?" + own[1:], "name the file of its authority in the URL: ?sslrootcert="},
		"another authority":                {byAddress + "?sslrootcert=" + other.CAFile() + own, "can't be trusted"},
		"no certificate":                   {byAddress + "?sslrootcert=" + server.CAFile(), "a certificate is demanded by Redis at "},
		"a certificate for another name":   {misnamed.TLSURL() + "?sslrootcert=" + misnamed.CAFile() + "&sslcert=" + misnamed.CAFile() + "&sslkey=" + misnamed.KeyFile(), "is for another name: x509: "},
		"a certificate of another's signs": {byAddress + "?sslrootcert=" + server.CAFile() + "&sslcert=" + other.CAFile() + "&sslkey=" + other.KeyFile(), "this client's certificate is refused by Redis at "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rdb, err := tasks.OpenRedis(c.url)
			if err != nil {
				t.Fatal(err)
			}
			defer rdb.Close()
			err = rdb.Ping(t.Context()).Err()
			// With TLS 1.3 a client may still write when the server has hung up already, and then misses the reason.
			for tries := 0; tries < 100 && (errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)); tries++ {
				err = rdb.Ping(t.Context()).Err()
			}
			explained, _ := startup.Explain("REDIS_URL", c.url, err)
			switch {
			case c.says == "" && err != nil, c.says != "" && err == nil:
				t.Errorf("the answer is %v", err)
			case err != nil && (!strings.Contains(explained.Error(), c.says) || strings.Contains(explained.Error(), server.KeyFile())):
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
