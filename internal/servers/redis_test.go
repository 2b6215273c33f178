//go:build unix

package servers

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestRedis_TakesCommandsWithItsPasswordAlone(t *testing.T) {
	t.Parallel()
	r := newRedis(t, RedisConfig{})
	if err := redisClient(t, r.URL()).Ping(t.Context()).Err(); err != nil {
		t.Error(err)
	}
	wrong := strings.Replace(r.URL(), r.password, "guessed", 1)
	if err := redisClient(t, wrong).Ping(t.Context()).Err(); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("a wrong password: %v", err)
	}
}

func TestRedis_ThePasswordIsOnNoCommandLine(t *testing.T) {
	t.Parallel()
	r := newRedis(t, RedisConfig{})
	line, err := exec.Command("ps", "-o", "args=", "-p", strconv.Itoa(r.server.pid())).Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(line), r.password) {
		t.Errorf("the password is for all to see: %s", line)
	}
}

func TestRedis_UsersHaveTheirRightsAloneAfterARestartToo(t *testing.T) {
	t.Parallel()
	r := newRedis(t, RedisConfig{Users: []string{"reader on >hush ~a:* -@all +ping +get (~b:* +get +set)"}})
	if err := r.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	reader := redisClient(t, strings.Replace(r.URL(), ":"+r.password, "reader:hush", 1))
	for _, err := range []error{reader.Ping(t.Context()).Err(), reader.Set(t.Context(), "b:1", "x", 0).Err()} {
		if err != nil {
			t.Error(err)
		}
	}
	if err := reader.Set(t.Context(), "a:1", "x", 0).Err(); !redis.HasErrorPrefix(err, "NOPERM") {
		t.Errorf("a key that it may only read: %v", err)
	}
}

func TestRedis_DatabasesAreApart(t *testing.T) {
	t.Parallel()
	r := newRedis(t, RedisConfig{})
	first, last := redisClient(t, r.DatabaseURL(0)), redisClient(t, r.DatabaseURL(RedisDatabases-1))
	if err := first.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := last.Get(t.Context(), "key").Err(); !errors.Is(err, redis.Nil) {
		t.Errorf("the last database: %v, want nothing in it", err)
	}
}

func TestRedis_WhatWasPersistedOutlivesACrash(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		fsync string
		want  error
	}{{"always", nil}, {"everysec", nil}, {"", redis.Nil}} {
		t.Run("fsync "+tc.fsync, func(t *testing.T) {
			t.Parallel()
			r := newRedis(t, RedisConfig{AppendFsync: tc.fsync})
			client := redisClient(t, r.URL())
			if err := client.Set(t.Context(), "key", "value", 0).Err(); err != nil {
				t.Fatal(err)
			}
			r.Kill()
			if err := client.Ping(t.Context()).Err(); err == nil {
				t.Fatal("a killed server answered")
			}
			if err := r.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := client.Get(t.Context(), "key").Err(); !errors.Is(err, tc.want) {
				t.Errorf("after the crash: %v, want %v", err, tc.want)
			}
		})
	}
}

func TestRedis_ItsFolderIsKeptWithTheData(t *testing.T) {
	t.Parallel()
	cfg := RedisConfig{Dir: t.TempDir(), AppendFsync: "everysec"}
	first := newRedis(t, cfg)
	if err := redisClient(t, first.URL()).Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := redisClient(t, newRedis(t, cfg).URL()).Get(t.Context(), "key").Err(); err != nil {
		t.Error(err)
	}
}

func TestRedis_PausedAnswersNobodyAndResumedGoesOn(t *testing.T) {
	t.Parallel()
	r := newRedis(t, RedisConfig{})
	client := redisClient(t, r.URL())
	if err := client.Ping(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	if err := r.Pause(); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := client.Ping(short).Err(); err == nil {
		t.Error("a paused server answered")
	}
	if err := r.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := client.Ping(t.Context()).Err(); err != nil {
		t.Error(err)
	}
}

func TestRedis_StopLeavesNoProcessAndNoFile(t *testing.T) {
	t.Parallel()
	for name, meanwhile := range map[string]func(*Redis) error{
		"running": func(*Redis) error { return nil },
		"paused":  func(r *Redis) error { return r.Pause() },
		"crashed": func(r *Redis) error { r.Kill(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRedis(t, RedisConfig{AppendFsync: "always"})
			pids := r.pids()
			if err := meanwhile(r); err != nil {
				t.Fatal(err)
			}
			if err := r.Stop(); err != nil {
				t.Fatal(err)
			}
			waitUntilGone(t, pids, r.home.dir)
			if err := r.Stop(); err != nil {
				t.Errorf("the second Stop: %v", err)
			}
			if r.Pause() == nil {
				t.Error("a stopped server could be paused")
			}
			if r.Restart(t.Context()) == nil {
				t.Error("a stopped server could be restarted")
			}
		})
	}
}

func TestRedis_ATakenPortIsNamed(t *testing.T) {
	t.Parallel()
	port := occupiedPort(t)
	_, err := StartRedis(t.Context(), RedisConfig{Port: port})
	if !errors.Is(err, errPortTaken) || !strings.Contains(err.Error(), strconv.Itoa(port)) {
		t.Errorf("got %v, want an error that names port %d", err, port)
	}
}

func TestRedis_WithoutAProgramTheErrorSaysWhatToInstall(t *testing.T) {
	t.Parallel()
	_, err := startRedis(t.Context(), RedisConfig{}, nowhere)
	if !errors.Is(err, ErrNotFound) || !strings.Contains(fmt.Sprint(err), "apt-get install redis-server") {
		t.Errorf("got %v", err)
	}
}

func TestRedis_ValkeyDoesAsWell(t *testing.T) {
	t.Parallel()
	r, err := startRedis(t.Context(), RedisConfig{}, func(name string) (string, error) {
		if name == "redis-server" {
			return "", exec.ErrNotFound
		}
		// The same program under its other name, wherever this machine has it.
		if path, err := exec.LookPath("valkey-server"); err == nil {
			return path, nil
		}
		return exec.LookPath("redis-server")
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Stop(); err != nil {
		t.Error(err)
	}
}

func TestRedis_RefusesAnUnknownAppendFsync(t *testing.T) {
	t.Parallel()
	if _, err := StartRedis(t.Context(), RedisConfig{AppendFsync: "sometimes"}); err == nil || !strings.Contains(err.Error(), `"sometimes"`) {
		t.Errorf("got %v, want an error that names the value", err)
	}
}

func TestMiniRedis_TimesToLiveEnd(t *testing.T) {
	t.Parallel()
	m, err := StartMiniRedis(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Stop()
	client := redisClient(t, m.URL())
	if err := client.Set(t.Context(), "lock", "held", 100*time.Millisecond).Err(); err != nil {
		t.Fatal(err)
	}
	if err := client.Get(t.Context(), "lock").Err(); err != nil {
		t.Fatalf("before its time: %v", err)
	}
	for deadline := time.Now().Add(giveUp); !errors.Is(client.Get(t.Context(), "lock").Err(), redis.Nil); {
		if time.Now().After(deadline) {
			t.Fatal("the time to live never ended")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestMiniRedis_TakesCommandsWithItsPasswordAloneUntilStopped(t *testing.T) {
	t.Parallel()
	m, err := StartMiniRedis(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := redisClient(t, strings.Replace(m.URL(), m.password, "guessed", 1)).Ping(t.Context()).Err(); err == nil {
		t.Error("a wrong password was taken")
	}
	client := redisClient(t, m.URL())
	if err := client.Ping(t.Context()).Err(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := m.Stop(); err != nil {
			t.Error(err)
		}
	}
	if client.Ping(t.Context()).Err() == nil {
		t.Error("it answered after Stop")
	}
}

// newRedis starts a server that is stopped when the test ends.
func newRedis(t *testing.T, cfg RedisConfig) *Redis {
	t.Helper()
	r, err := StartRedis(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// redisClient is a client that tries once and is closed when the test ends.
func redisClient(t *testing.T, url string) *redis.Client {
	t.Helper()
	options, err := redis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	options.MaxRetries, options.DialerRetries = -1, 1
	options.ContextTimeoutEnabled = true
	client := redis.NewClient(options)
	t.Cleanup(func() { _ = client.Close() })
	return client
}
