"""Rewards: extract the final answer of a response, verify it against references, check the format, add up
the terms of a reward."""
