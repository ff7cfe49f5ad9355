"""A run folder such as the tiny curriculum leaves behind, made up: learning curves with noise and
nulls, evaluations after each stage, traces of all sorts (right, wrong, many paths, cut off, hostile)."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert(1)\">"
STAGES = {
    "arithmetic": ("sft", 250),
    "cold_start": ("sft", 200),
    "rl_easy": ("rl", 40),
    "rl_hard": ("rl", 120),
}
CONFIG = """name: tiny
model: {hidden: 128, layers: 3, heads: 4}
rollout:
  paths: 4
  max_path_tokens: 16
note: "<b>a tag in a recipe stays text</b>"
"""


def write_run(folder: Path, seed: int = 0, stages_json: bool = True) -> Path:
    """Writes a whole run; returns `folder`."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    if stages_json:
        (folder / "stages.json").write_text(json.dumps(list(STAGES)))
    done = 0
    for name, (kind, steps) in STAGES.items():
        rows = [
            _sft(rng, name, step, steps) if kind == "sft" else _rl(rng, name, step, steps, done + step)
            for step in range(1, steps + 1)
        ]
        write_lines(folder / name / "metrics.jsonl", rows)
        if kind == "rl":
            write_lines(folder / name / "traces.jsonl", _traces(rng, name, steps, done))
            done += steps
    write_lines(folder / "eval.jsonl", evals())
    return folder


def write_lines(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evals() -> list[Record]:
    rows = [
        ("arithmetic", 250, 0.083, 0.0, 0.0, 0.0, 20.1, 20.1, "sequential"),
        ("cold_start", 200, 0.391, 0.342, 0.971, 0.41, 38.3, 23.9, "isolated"),
        ("rl_easy", 40, 0.476, 0.702, 0.985, 0.86, 61.0, 26.4, "isolated"),
        ("rl_hard", 120, 0.642, 0.934, 0.991, 1.42, 92.4, 29.3, "isolated"),
    ]
    names = "stage step accuracy parallel_ratio well_formed_blocks blocks_per_trace length critical_length"
    records = [dict(zip([*names.split(), "mode"], row, strict=True)) for row in rows]
    for record in records:
        share = record["accuracy"]
        half_width = 1.96 * math.sqrt(share * (1 - share) / 512)
        record |= {"kind": "eval", "problems": 512, "ci95": half_width}
    return records


def _sft(rng: random.Random, stage: str, step: int, steps: int) -> Record:
    start, end, pace = (3.4, 0.72, 28) if stage == "arithmetic" else (1.6, 0.58, 34)
    loss = end + (start - end) * math.exp(-step / pace) + rng.gauss(0, 0.02)
    return {
        "stage": stage,
        "kind": "sft",
        "step": step,
        "steps": steps,
        "loss": loss,
        "grad_norm": 0.4 + 2 * math.exp(-step / 40),
        "lr": 3e-3,
        "tokens": 4096,
        "time_s": 0.19,
    }


def _rl(rng: random.Random, stage: str, step: int, steps: int, seen: int) -> Record:
    grown = 1 - math.exp(-seen / 55)
    share = (0.42 if stage == "rl_easy" else 0.30) + 0.34 * grown + rng.gauss(0, 0.05)
    ratio = min(1.0, max(0.0, 0.33 + 0.62 * grown + rng.gauss(0, 0.03)))
    length = 38 + 56 * grown + rng.gauss(0, 2)
    return {
        "stage": stage,
        "kind": "rl",
        "step": step,
        "steps": steps,
        "reward": share * (1.1 if step % 5 == 0 else 1.0),
        "accuracy": share,
        "parallel_ratio": ratio,
        "well_formed": min(1.0, 0.965 + 0.025 * grown + rng.gauss(0, 0.006)),
        "blocks_per_trace": 0.4 + grown,
        "first_block": None if step == 7 else 0.12 + 0.2 * grown + rng.gauss(0, 0.02),
        "length": length,
        "critical_length": 23 + 7 * grown + rng.gauss(0, 0.6),
        "entropy": 0.82 * math.exp(-seen / 110) + 0.16 + rng.gauss(0, 0.015),
        "mismatch_max": 10 ** rng.gauss(-5.6, 0.15),
        "mismatch_mean": 10 ** rng.gauss(-6.9, 0.1),
        "mismatch_k3": 1e-12,
        "clip_fraction": 0.01,
        "loss": rng.gauss(0, 0.02),
        "grad_norm": 0.5,
        "lr": 3e-4,
        "truncated": 0.02,
        "reward_term": "accuracy" if step % 5 else "accuracy_parallel",
        "time_rollout_s": 0.52,
        "time_train_s": 0.55,
        "tokens": int(96 * length),
    }


def _traces(rng: random.Random, stage: str, steps: int, done: int) -> list[Record]:
    records = [_wide(stage, steps), _hostile(stage, steps), _cut(stage, steps)]
    for step in range(5, steps + 1, 5):
        for i in range(8):
            grown = 1 - math.exp(-(done + step) / 55)
            paths = rng.choice([2, 3, 4, 4, 4]) if rng.random() < 0.35 + 0.6 * grown else 0
            records.append(_congruence(rng, stage, step, paths, blocks=1 + (i % 3 == 0)))
    return records


def _congruence(rng: random.Random, stage: str, step: int, paths: int, blocks: int) -> Record:
    a, truth = rng.randint(2, 12), rng.randint(0, 12)
    c = (truth * truth + a * truth) % 13
    parts: list[Record] = []
    value: int | None = None
    for number in range(blocks if paths else 0):
        tries = [_try(rng, a, c) for _ in range(paths)]
        found = [int(path["answer"]) for path in tries if path["correct"]]
        value = found[0] if found else value
        parts.append({"kind": "text", "text": "several guesses" if number == 0 else "more guesses"})
        parts.append(
            {
                "kind": "block",
                "paths": tries,
                "summary": f"F={value}" if found else "none fits",
                "well_formed": True,
            }
        )
        if found:
            break
    if not paths:
        path = _try(rng, a, c)
        value = int(path["answer"]) if path["correct"] else None
        parts.append({"kind": "text", "text": path["text"]})
    if value is None and rng.random() < 0.7:
        value = rng.randint(0, 12)
    extracted = None if value is None else str(value)
    right = extracted is not None and (int(extracted) ** 2 + a * int(extracted)) % 13 == c
    if extracted is not None:
        parts.append({"kind": "text", "text": f"Final Answer: {extracted}"})
    return {
        "stage": stage,
        "step": step,
        "problem": f"x² + {a}·x = {c} (mod 13). Find x.",
        "answer": str(truth),
        "extracted": extracted,
        "correct": right,
        "reward": float(right) * (1.2 if paths else 1.0),
        "text_parts": parts,
    }


def _try(rng: random.Random, a: int, c: int) -> Record:
    x = rng.randint(0, 12)
    square, product = x * x % 13, a * x % 13
    total = (square + product) % 13
    right = total == c
    text = f"x={x} q={square} t={product} u={total} {'ok F=' + str(x) if right else 'no'}"
    return {"text": text, "closed": True, "forced": False, "answer": str(x), "correct": right}


def _wide(stage: str, step: int) -> Record:
    """Six long paths, one closed by the engine, one without a verdict, one with a block of its own."""
    sentences = [
        "Count the complement: there are 2^5 = 32 strings, and those without two equal neighbours are 2.",
        "Let a_n be the number of good strings of length n. Then a_1 = 2, a_2 = 2 and a_n = 2 for every n, "
        "because the first symbol decides all others.\n\nSo the count asked for is 32 − 2 = 30.",
        "Write the generating function $\\frac{2x}{1-x}$ and read off its fifth coefficient, which is 2.",
        "Try small cases: n = 2 gives 4 − 2 = 2, n = 3 gives 8 − 2 = 6, and it looks like 2^n − 2,",
        "By inclusion and exclusion over the four neighbouring pairs: 4·16 − 6·8 + 4·4 − 2 = 30.",
        "There are 5 symbols, so 5! = 120 orders.",
    ]
    verdicts = [("30", True), ("30", True), ("2", False), (None, None), ("30", True), ("120", False)]
    paths = [
        {"text": text, "closed": True, "forced": i == 3, "answer": answer, "correct": correct}
        for i, (text, (answer, correct)) in enumerate(zip(sentences, verdicts, strict=True))
    ]
    paths[4]["parts"] = [
        {"kind": "text", "text": "Two ways to add the pairs up:"},
        {
            "kind": "block",
            "paths": [
                {"text": "64 − 48 + 16 − 2 = 30", "closed": True, "answer": "30", "correct": True},
                {"text": "64 − 48 + 16 = 32", "closed": True, "answer": "32", "correct": False},
            ],
            "summary": "The last term belongs to it: 30.",
            "well_formed": True,
        },
    ]
    return {
        "stage": stage,
        "step": step,
        "problem": "How many binary strings of length 5 hold at least two equal neighbours?",
        "answer": "30",
        "extracted": "30",
        "correct": True,
        "reward": 1.2,
        "finish": "eos",
        "text_parts": [
            {"kind": "text", "text": "There are several ways to count these strings. I follow them apart."},
            {
                "kind": "block",
                "paths": paths,
                "summary": "Three counts agree on 30. The third stopped at the complement, "
                "the last counted orders.",
                "well_formed": True,
            },
            {"kind": "text", "text": "So the strings number 30.\n\nFinal Answer: 30"},
        ],
    }


def _hostile(stage: str, step: int) -> Record:
    path = {"text": HOSTILE, "closed": True, "answer": HOSTILE, "correct": False}
    block = {
        "kind": "block",
        "paths": [path],
        "summary": HOSTILE,
        "well_formed": False,
        "stray": "text between the paths & <Path>",
    }
    return {
        "stage": stage,
        "step": step,
        "problem": HOSTILE,
        "answer": HOSTILE,
        "extracted": HOSTILE,
        "correct": False,
        "reward": 0.0,
        "text_parts": [{"kind": "text", "text": HOSTILE + " \ud800 \x00"}, block],
    }


def _cut(stage: str, step: int) -> Record:
    """Truncated inside the second path, before any summary."""
    paths = [
        {"text": "x=4 q=3 t=2 u=5 no", "closed": True, "answer": "4", "correct": False},
        {"text": "x=9 q=3 t=", "closed": False, "answer": None, "correct": None},
    ]
    return {
        "stage": stage,
        "step": step,
        "problem": "x² + 7·x = 8 (mod 13). Find x.",
        "answer": "1",
        "extracted": None,
        "correct": False,
        "reward": None,
        "finish": "length",
        "text_parts": [{"kind": "block", "paths": paths, "summary": None, "well_formed": False}],
    }
