"""Reinforcement learning: the loop, rollout workers, rewards to advantages, the learner."""
