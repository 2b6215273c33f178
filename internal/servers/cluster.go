package servers

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/redis/go-redis/v9"
)

// RedisCluster is a Redis Cluster of three masters, each with a replica that takes its place when it is away.
type RedisCluster struct {
	// Masters are those at the start, and Replicas[i] is that of Masters[i].
	Masters, Replicas []*Redis
}

// clusterSlots is how many slots a Redis Cluster has.
const clusterSlots = 16384

// StartRedisCluster starts the six of them on free ports, all with one password, and returns when each knows all others. A
// master is away when it has given no answer for a second. cfg is that of the servers; its Dir and Port must not be set. It
// takes Redis 7 or Valkey. The context bounds the start alone.
func StartRedisCluster(ctx context.Context, cfg RedisConfig) (cluster *RedisCluster, err error) {
	if cfg.Dir != "" || cfg.Port != 0 || cfg.ReplicaOf != nil {
		return nil, errors.New("servers: start a Redis Cluster: Dir, Port and ReplicaOf must not be set")
	}
	cluster = new(RedisCluster)
	defer func() {
		if err != nil {
			cluster, err = nil, errors.Join(fmt.Errorf("servers: start a Redis Cluster: %w", err), cluster.Stop())
		}
	}()
	cfg.cluster = newPassword()
	for range 3 {
		for _, servers := range []*[]*Redis{&cluster.Masters, &cluster.Replicas} {
			r, err := StartRedis(ctx, cfg)
			if err != nil {
				return nil, err
			}
			*servers = append(*servers, r)
		}
	}
	return cluster, cluster.form(ctx)
}

// form makes a cluster of the servers.
func (c *RedisCluster) form(ctx context.Context) error {
	first := c.Masters[0]
	for i, r := range c.Masters {
		slots := []any{"CLUSTER", "ADDSLOTSRANGE", i * clusterSlots / 3, (i+1)*clusterSlots/3 - 1}
		if err := r.do(ctx, slots...).Err(); err != nil {
			return err
		}
	}
	for _, r := range c.all()[1:] {
		if err := r.do(ctx, "CLUSTER", "MEET", "127.0.0.1", first.port, first.busPort).Err(); err != nil {
			return err
		}
	}
	for _, r := range c.all() {
		if err := r.server.until(ctx, r.says(ctx, "CLUSTER INFO", "cluster_known_nodes:6")); err != nil {
			return err
		}
	}
	for i, r := range c.Replicas {
		id, err := c.Masters[i].do(ctx, "CLUSTER", "MYID").Text()
		if err != nil {
			return err
		}
		// It knows that master by its name a moment after it knows it by its address.
		err = r.server.until(ctx, func() bool { return r.do(ctx, "CLUSTER", "REPLICATE", id).Err() == nil })
		if err != nil {
			return err
		}
	}
	for _, r := range c.Replicas {
		if err := r.server.until(ctx, r.says(ctx, "INFO replication", "master_link_status:up")); err != nil {
			return err
		}
	}
	for _, r := range c.all() {
		if err := r.server.until(ctx, r.says(ctx, "CLUSTER INFO", "cluster_state:ok")); err != nil {
			return err
		}
	}
	return nil
}

// do sends one command.
func (r *Redis) do(ctx context.Context, args ...any) *redis.Cmd {
	client := redis.NewClient(&redis.Options{Addr: r.addr(), Password: r.password, DialTimeout: time.Second})
	defer client.Close()
	return client.Do(ctx, args...)
}

func (c *RedisCluster) all() []*Redis {
	return append(c.Masters[:len(c.Masters):len(c.Masters)], c.Replicas...)
}

// Of returns the number of the master that has a key at the start, in Masters and Replicas.
func (c *RedisCluster) Of(ctx context.Context, key string) (int, error) {
	slot, err := c.Masters[0].do(ctx, "CLUSTER", "KEYSLOT", key).Int()
	if err != nil {
		return 0, fmt.Errorf("servers: which master has a key: %w", err)
	}
	for i := range c.Masters {
		if slot < (i+1)*clusterSlots/3 {
			return i, nil
		}
	}
	return 0, fmt.Errorf("servers: which master has a key: slot %d is none", slot)
}

// URL leads to the cluster, as tasks.OpenRedis takes it.
func (c *RedisCluster) URL() string {
	u := url.URL{Scheme: "redis-cluster", User: url.UserPassword("", c.Masters[0].password), Host: addrs(c.all())}
	return u.String()
}

// Stop ends all six and removes their files. Stopping twice is safe.
func (c *RedisCluster) Stop() error {
	return errors.Join(stopAll(c.Replicas...), stopAll(c.Masters...)) // the other way round they would see a failure
}
