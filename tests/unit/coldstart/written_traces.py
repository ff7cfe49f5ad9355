"""Traces as a teacher might write them, good and bad, and problems to write them for."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_parallel_r1.coldstart.settings import ColdStart
from megatron_parallel_r1.data.problems import Problem


def block(paths: int = 2, text: str = "look at it") -> str:
    inside = "".join(f"<Path>\n{text} {index}\n</Path>\n" for index in range(paths))
    return f"<Parallel>\n{inside}</Parallel>\n<Summary>\nthey agree\n</Summary>"


def trace(answer: str, blocks: tuple[int, ...] = (2,), note: str = "") -> str:
    return f"Let us see {note}.\n\n" + "\n\n".join(map(block, blocks)) + f"\n\nFinal Answer: {answer}"


def posed(number: int) -> Problem:
    return Problem(str(number), f"What is {number} plus {number}?", (str(2 * number),), "test")


def answer_to(text: str) -> str:
    """The right answer to the problem that a prompt poses."""
    return str(2 * int(text.rsplit(" plus ", 1)[1].split("?")[0]))


def gsm8k_file(folder: Path, count: int) -> Path:
    path = folder / "problems.jsonl"
    rows = ({"question": posed(n).prompt, "answer": f"They add up. #### {2 * n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_tree(url: str, data: Path, out: Path) -> dict:
    """Settings as a YAML file would hold them; quick to retry."""
    return {
        "out": str(out),
        "data": {"name": "openai/gsm8k", "path": str(data)},
        "teacher": {
            "kind": "endpoint",
            "url": url,
            "model": "fake",
            "timeout_s": 20,
            "backoff_s": 0.01,
            "longest_wait_s": 0.05,
            "retries": 3,
        },
        "concurrency": 4,
    }


def settings_with(url: str, data: Path, out: Path, changes: dict | None = None) -> ColdStart:
    return ColdStart.read(settings_tree(url, data, out) | (changes or {}), "test")
