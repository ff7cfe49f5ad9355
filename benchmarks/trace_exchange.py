"""CPU seconds of a rank for the traces of an RL step, by the number of ranks.

    python -m benchmarks.trace_exchange [--traces 2048] [--tokens 3000] [--ranks 1 2 4 8] [--experts 0]

Each rank is a process (gloo) and a replica of its own. It packs the traces that it drew, gathers those of all
ranks, computes the step's metrics, and lays out and packs the rows that it trains; nothing is sampled or
trained. `--experts` is the bytes of recorded experts that each token has (768 for Qwen3-30B-A3B); they go to
the ranks that train its trace alone. Then the same processes do what they would if traces were exchanged as
Python objects: gather all of them, lay out all rows, and pack those that they train.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.page import Table, add_write_option, publish
from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import (
    all_gather_objects,
    gather_from_replicas,
    gather_objects,
    replica_slice,
)
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.format_check import Format
from megatron_parallel_r1.rl.expert_exchange import with_own
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.metrics import group_metrics, staleness_metrics, trace_metrics
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.thought.layout import lay_out
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer
from megatron_parallel_r1.utils.rank import is_rank_zero

ROOT = Path(__file__).resolve().parents[1]
TAGS, VOCABULARY, SAMPLES = Tags(0, 1, 2, 3, 4, 5, 6), 1000, 8
PHASES = ("pack", "exchange", "metrics", "lay out")
OBJECTS = ("exchange of objects", "lay out all")


def trace_of(seed: int, tokens: int) -> Trace:
    """A trace of about `tokens` tokens: a main chain, and a block of four paths with a summary."""
    rng = random.Random(seed)

    def text(count: int) -> list[int]:
        return rng.choices(range(7, VOCABULARY), k=count)

    part = (tokens - 13) // 6
    paths = [token for _ in range(4) for token in (TAGS.path, *text(part), TAGS.path_end)]
    inner = [TAGS.parallel, *paths, TAGS.parallel_end, TAGS.summary, *text(part), TAGS.summary_end]
    flat = (*text(part), *inner, TAGS.eos)
    tree = parse(flat, TAGS)
    forced = tree.forced()
    sampled = tuple(index not in forced for index in range(len(flat)))
    logprobs = tuple(-rng.random() if is_sampled else 0.0 for is_sampled in sampled)
    nothing = (False,) * len(flat)
    return Trace(tuple(text(100)), flat, sampled, nothing, logprobs, "eos", tree, (3,) * len(flat))


def measure(count: int, tokens: int, experts: int) -> list[float]:
    """CPU seconds of this rank for each of PHASES and OBJECTS."""
    shape = ModelConfig(16, 1, 2, 1, 8, 16, vocab=VOCABULARY, max_positions=2 * tokens)
    if experts:
        chosen = ExpertsConfig(count=8, per_token=8, ffn=16)
        shape = replace(shape, layers=experts // 16, family="qwen3_moe", experts=chosen)
    trainer = Trainer(build_model(shape), Adam(lr=1.0))
    batch = BatchConfig(SAMPLES, 1, 1, micro_tokens=4 * tokens, max_response_tokens=tokens)
    learner = Learner(trainer, Objective(), batch, "isolated", TAGS)
    own = [trace_of(seed, tokens) for seed in replica_slice(range(count))]
    own = [replace(trace, experts=bytes(experts * (100 + len(trace.tokens)))) for trace in own]
    verdict = Judged(True, Format(blocks=1, well_formed_blocks=1, paths=4), "42", "number", "text " * 100)
    times = [time.process_time()]
    packed = [PackedTrace.of(trace) for trace in own]
    times.append(time.process_time())
    pairs = gather_from_replicas(lambda: [(trace.without_experts, verdict) for trace in packed])
    traces, judged = with_own([trace for trace, _ in pairs], packed), [judgement for _, judgement in pairs]
    times.append(time.process_time())
    outlines = [trace.outline for trace in traces]
    trace_metrics(outlines, judged)
    group_metrics(judged, SAMPLES)
    staleness_metrics(outlines, 4, 1, SAMPLES)
    times.append(time.process_time())
    learner.prepare(traces)
    times.append(time.process_time())
    parts = all_gather_objects([(trace, verdict) for trace in own])
    everything = [trace for part in parts for trace, _ in part]
    times.append(time.process_time())
    rows = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, "isolated") for t in everything]
    engine, suppressed = {"engine": [t.logprobs for t in everything]}, [t.suppressed for t in everything]
    for row in partition_rows(rows, batch.micro_tokens, trainer.partition):
        MicroBatch.of(row, trainer.device, engine, suppressed, TAGS.parallel)
    times.append(time.process_time())
    return [after - before for before, after in pairwise(times)]


def row_of(ranks: int, count: int, tokens: int, experts: int) -> list[str]:
    """Runs `ranks` processes under torchrun; returns a row of the table."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words += ["-m", "benchmarks.trace_exchange", "--as-rank", "--traces", str(count), "--tokens", str(tokens)]
    words += ["--experts", str(experts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    parts = [max(of_phase) for of_phase in zip(*seconds, strict=True)]
    ours = max(sum(of_rank[: len(PHASES)]) for of_rank in seconds)
    objects = max(sum(of_rank[len(PHASES) :]) for of_rank in seconds)
    cells = [*parts[: len(PHASES)], ours, *parts[len(PHASES) :], objects, objects / ours]
    return [str(ranks), *(f"{cell:.2f}" for cell in cells)]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--experts", type=int, default=0, help="bytes a token, a multiple of 16")
    add_write_option(parser)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)  # started by itself
    args = parser.parse_args(words)
    if args.as_rank:
        with process.running(seed=0):
            found = gather_objects(measure(args.traces, args.tokens, args.experts))
            if is_rank_zero():
                print(json.dumps(found), flush=True)
        return
    rows = [row_of(ranks, args.traces, args.tokens, args.experts) for ranks in args.ranks]
    note = (
        "CPU seconds of the slowest rank. Packing and laying out fall with the number of ranks; the exchange "
        "copies the bytes of all traces and unpickles their outlines and verdicts."
    )
    title = f"{args.traces} traces of {args.tokens} tokens"
    title += f" with {args.experts} bytes of experts" if args.experts else ""
    columns = ("ranks", *PHASES, "in all", *OBJECTS, "in all", "ratio")
    publish("trace exchange", [Table(title, columns, rows, note)], f"{os.cpu_count()} CPU cores", args.write)


if __name__ == "__main__":
    main()
