"""Starts rollout servers of a checkpoint, restarts one that crashes, and ends them all with itself."""
