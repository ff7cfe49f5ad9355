"""Reads an embedded problem back from its question."""

from __future__ import annotations

from megatron_parallel_r1.data.embedded.congruence import Congruence


def read(prompt: str) -> Congruence:
    """The problem that a question poses, read back from its words."""
    words = prompt.removeprefix("Solve mod 13: ").split()
    hard = words[0].endswith("x²")
    a, c, d = int(words[0].rstrip("x²")), int(words[-1].strip("=")), int(words[-2])
    return Congruence("hard" if hard else "easy", a, int(words[1].rstrip("x")) if hard else 0, d, c)
