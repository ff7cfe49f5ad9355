"""Memory and time of one training step on traces of up to 32k tokens on the critical path.

    python -m benchmarks.long_traces [--critical 4096 8192 16384 32768] [--modes isolated replay]
                                     [--threads 1] [--write]

One trace of blocks with four paths, each step in a process of its own: forward, backward, AdamW, on a model
of two layers of 128. Memory is the peak beyond what the process held after a step on a short trace. The
exponents between neighbours are 1 where cost is linear in the row's tokens. Attention compares each token
with those that it sees, so that time grows faster once attention dominates: pairs are counted beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from benchmarks.embedded_work import EmbeddedWork
from benchmarks.page import Table, add_write_option, publish
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors
from megatron_parallel_r1.sft.loop import sft_step
from megatron_parallel_r1.thought.layout import Mode, Row, critical_length, lay_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.train.trainer import Adam, Trainer

PATHS, TRUNK, PATH, SUMMARY = 4, 400, 560, 57
ADAM = Adam(lr=1e-4)
WORD = 9  # a token without meaning here


@dataclass(frozen=True, slots=True)
class LongStep:
    """What one step cost; `pairs` counts the (token, seen token) pairs of a head."""

    critical: int
    tokens: int
    row: int
    pairs: int
    seconds: float
    bytes: int


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--critical", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=["isolated", "replay"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="one mode and length, in this process, as JSON")
    add_write_option(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    if args.alone:
        print(json.dumps(asdict(measure(args.critical[0], args.modes[0]))))
        return
    rows: list[list[str]] = []
    for mode in args.modes:
        before: LongStep | None = None
        for critical in args.critical:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.long_traces", "--alone"]
            command += ["--critical", str(critical), "--modes", mode, "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            step = LongStep(**json.loads(done.stdout.splitlines()[-1]))
            rows.append([mode, *_cells(step, before)])
            before = step
    columns = (
        "mode",
        "critical path",
        "trace",
        "row",
        "KiB a token",
        "exponent",
        "CPU µs a token",
        "exponent",
    )
    table = Table(
        "One step on one long trace",
        (*columns, "pairs a token"),
        rows,
        f"Blocks of {PATHS} paths of {PATH} tokens. Two layers of 128, float32; `row` counts the tokens that "
        "`replay` repeats.",
    )
    publish("long traces", [table], f"CPU, {args.threads} thread, torch {torch.__version__}", args.write)


def _cells(step: LongStep, before: LongStep | None) -> list[str]:
    def exponent(name: str) -> str:
        if before is None:
            return ""
        growth = getattr(step, name) / getattr(before, name)
        return f"{math.log(growth) / math.log(step.row / before.row):.2f}"

    return [
        *(f"{number:,}" for number in (step.critical, step.tokens, step.row)),
        *(f"{step.bytes / 1024 / step.row:.1f}", exponent("bytes")),
        *(f"{1e6 * step.seconds / step.row:.0f}", exponent("seconds")),
        f"{step.pairs / step.row:,.0f}",
    ]


def measure(critical: int, mode: Mode) -> LongStep:
    """Makes one step on a short trace, and one on a trace with `critical` tokens or more on its chain."""
    work = EmbeddedWork()
    with process.running(seed=1):
        model = build_model(work.shape)
        load_hf_tensors(model, work.tensors.items())
        trainer = Trainer(model, ADAM)
        sft_step(trainer, [_row(work.tags, 64, mode)[0]], 1, ADAM.lr)
        row, length, chain = _row(work.tags, critical, mode)
        held, began = _peak(), time.process_time()
        sft_step(trainer, [row], len(row), ADAM.lr)
        seconds = time.process_time() - began
    hidden = int((row.hide_hi_DL.astype(int) - row.hide_lo_DL).sum())
    pairs = len(row) * (len(row) + 1) // 2 - hidden
    return LongStep(chain, length, len(row), pairs, seconds, max(1, _peak() - held))


def _row(tags: Tags, critical: int, mode: Mode) -> tuple[Row, int, int]:
    """A row, the tokens of its trace, and those on its critical path."""
    assert tags.parallel_end is not None and tags.summary is not None and tags.summary_end is not None
    path = [tags.path, *[WORD] * PATH, tags.path_end]
    summary = [tags.parallel_end, tags.summary, *[WORD] * SUMMARY, tags.summary_end]
    block = [*[WORD] * TRUNK, tags.parallel, *path * PATHS, *summary]
    blocks = math.ceil(critical / (len(block) - (PATHS - 1) * len(path)))
    tokens = block * blocks if mode != "sequential" else [WORD] * critical
    tree = parse(tokens, tags, strict=True)
    forced = tree.forced()
    sampled = [index not in forced for index in range(len(tokens))]
    return lay_out([WORD], tokens, sampled, tree, mode), len(tokens), critical_length(tree)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
