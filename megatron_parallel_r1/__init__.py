"""Trains language models to think in parallel with reinforcement learning, at Megatron scale.
Rooms: thought, model, rollout, rewards, data, train, report; docs/architecture.md walks through them."""
