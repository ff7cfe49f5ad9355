"""Brings a trainer's weights to rollout servers: gathered from its shards a bucket at a time, sent by
broadcast, shared memory or disk, and proved by a probe. The trainer's processes meet in `Publisher.publish`;
what a kind of server can do is its `Control`."""
