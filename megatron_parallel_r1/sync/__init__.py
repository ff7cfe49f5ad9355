"""Brings a trainer's weights to rollout servers: gathered from its shards one bucket at a time, sent by
broadcast, shared memory or disk, and verified by a probe. `Publisher.publish` is the entry point, called by
all ranks."""
