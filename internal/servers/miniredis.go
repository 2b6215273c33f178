package servers

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// MiniRedis is a Redis within this process, for a machine without redis-server. It keeps nothing, is about a quarter as
// fast, and proves nothing about durability.
type MiniRedis struct {
	server   *miniredis.Miniredis
	password string
	stop     func()
}

// miniRedisTick is how often its clock is moved on. Times to live, and with them asynq's locks, are this precise.
const miniRedisTick = 20 * time.Millisecond

// StartMiniRedis starts one on a free port of 127.0.0.1. The context bounds the start alone: it runs until Stop.
func StartMiniRedis(ctx context.Context) (*MiniRedis, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("servers: start miniredis: %w", err)
	}
	m := &MiniRedis{server: miniredis.NewMiniRedis(), password: newPassword()}
	m.server.RequireAuth(m.password)
	if err := m.server.Start(); err != nil {
		return nil, fmt.Errorf("servers: start miniredis: %w", err)
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var clock sync.WaitGroup
	clock.Go(func() { m.keepTime(running) })
	m.stop = sync.OnceFunc(func() {
		cancel()
		clock.Wait()
		m.server.Close()
	})
	return m, nil
}

// keepTime moves the clock on in step with real time. On its own it stands still for times to live. SetTime would not do:
// scheduled tasks came late and retention broke.
func (m *MiniRedis) keepTime(ctx context.Context) {
	tick := time.NewTicker(miniRedisTick)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			now := time.Now()
			m.server.FastForward(now.Sub(last))
			last = now
		}
	}
}

// URL leads to its database 0.
func (m *MiniRedis) URL() string {
	u := url.URL{
		Scheme: "redis", User: url.UserPassword("", m.password),
		Host: net.JoinHostPort("127.0.0.1", m.server.Port()), Path: "/0",
	}
	return u.String()
}

// Stop ends it; what it held is gone. Stopping twice is safe.
func (m *MiniRedis) Stop() error {
	m.stop()
	return nil
}
