"""Clients of rollout servers, and the pool that routes requests to them."""
