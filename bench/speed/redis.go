package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// redisStats is what Redis has done since its start.
type redisStats struct {
	commands int // with those in scripts
	cpu      time.Duration
}

func statsOf(ctx context.Context, rdb *redis.Client) (redisStats, error) {
	info, err := rdb.Info(ctx, "stats", "cpu").Result()
	if err != nil {
		return redisStats{}, err
	}
	fields := make(map[string]string)
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		fields[name] = value
	}
	commands, err := strconv.Atoi(fields["total_commands_processed"])
	if err != nil {
		return redisStats{}, fmt.Errorf("INFO stats: %w", err)
	}
	var cpu float64
	for _, name := range []string{"used_cpu_user", "used_cpu_sys"} {
		seconds, err := strconv.ParseFloat(fields[name], 64)
		if err != nil {
			return redisStats{}, fmt.Errorf("INFO cpu: %w", err)
		}
		cpu += seconds
	}
	return redisStats{commands, time.Duration(cpu * float64(time.Second))}, nil
}

// monitor counts the commands that Redis runs. It reads MONITOR, because INFO doesn't tell
// those that a client sends from those that a script calls.
type monitor struct {
	conn            net.Conn
	ended           chan struct{}
	sent, inScripts int // to be read when ended is closed
}

func monitorRedis(ctx context.Context, url string) (*monitor, error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", opts.Addr)
	if err != nil {
		return nil, err
	}
	lines := bufio.NewReader(conn)
	for _, command := range []string{"AUTH " + opts.Password, "MONITOR"} {
		_, err := fmt.Fprintf(conn, "%s\r\n", command)
		if err == nil {
			var answer string
			if answer, err = lines.ReadString('\n'); err == nil && answer != "+OK\r\n" {
				err = fmt.Errorf("%s: Redis answers %s", strings.Fields(command)[0], strings.TrimSpace(answer))
			}
		}
		if err != nil {
			_ = conn.Close()
			return nil, err
		}
	}
	m := &monitor{conn: conn, ended: make(chan struct{})}
	go func() {
		defer close(m.ended)
		for {
			line, err := lines.ReadString('\n') // what is in a command is escaped: a line is a command
			if err != nil {
				return
			}
			if _, after, _ := strings.Cut(line, " ["); strings.HasPrefix(after[strings.IndexByte(after, ' ')+1:], "lua]") {
				m.inScripts++
			} else {
				m.sent++
			}
		}
	}()
	return m, nil
}

// close ends the counting and returns what was counted.
func (m *monitor) close() (sent, inScripts int) {
	_ = m.conn.Close()
	<-m.ended
	return m.sent, m.inScripts
}
