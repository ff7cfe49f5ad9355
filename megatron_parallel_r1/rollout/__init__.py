"""Rolls traces out: the parallel-thinking loop, and the engines that it drives through one small protocol.
The loop (`thinking.py`) knows no engine, and an engine knows no tags."""
