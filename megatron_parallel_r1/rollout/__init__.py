"""Rolls out traces: the parallel-thinking loop and the engines beneath it, behind one small protocol. The
loop (`thinking.py`) knows no engine, and an engine knows no tags."""
