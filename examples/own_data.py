r"""Writes a data set of your own in two files, and says how a recipe reads them.

    python examples/own_data.py data
    parallel-r1 init --model Qwen/Qwen3-4B-Base --data data/problems.jsonl \
        --columns prompt=task,answer=result --cold-start Parallel-R1/Parallel-GSM8K=data/traces.jsonl

A problem needs a text and its right answer, in columns of any names. A worked example for the cold start has
a response with the tags, too: each path on its own, a summary that reads them all, the answer on a last line.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.exit import one_line_exit


def problem(draw: random.Random) -> tuple[str, int, int]:
    """A question about an area, and the two sides."""
    width, height = draw.randint(11, 99), draw.randint(3, 9)
    return f"A garden is {width} m by {height} m. What is its area?", width, height


def trace(width: int, height: int) -> str:
    """A response that computes one product in two ways."""
    tens, ones, short, area = width // 10 * 10, width % 10, 10 - height, width * height
    parts = f"{tens} x {height} = {tens * height} and {ones} x {height} = {ones * height}, in all {area}."
    less = f"{width} x 10 = {width * 10}, less {width} x {short} = {width * short}, is {area}."
    return (
        f"I multiply {width} by {height} in two ways.<Parallel><Path>{parts}</Path><Path>{less}</Path>"
        f"</Parallel><Summary>Both ways give {area}.</Summary>\nFinal Answer: {area}"
    )


def write(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: own_data.py FOLDER")
    folder, draw = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    problems = [problem(draw) for _ in range(300)]
    write(folder / "problems.jsonl", [{"task": text, "result": a * b} for text, a, b in problems[:200]])
    write(
        folder / "traces.jsonl",
        [{"question": text, "response": trace(a, b), "answer": a * b} for text, a, b in problems[200:]],
    )


if __name__ == "__main__":
    with one_line_exit():
        main()
