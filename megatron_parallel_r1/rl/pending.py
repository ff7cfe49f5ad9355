"""Pending batches (rolled out, not yet trained) as JSON for a checkpoint; they are restored bit for bit.

Each per-token value of the traces is one column over all traces of a batch, compressed, in base64: as a JSON
list, a trace of 32k tokens would have 160k members.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.rl.expert_exchange import fetch_experts
from megatron_parallel_r1.rl.packed_trace import COLUMNS, PackedTrace
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts
from megatron_parallel_r1.thought.trace import Finish, Trace
from megatron_parallel_r1.thought.tree import Tree
from megatron_parallel_r1.utils.rank import is_rank_zero

PROBLEMS, TREES = TypeAdapter(list[Problem]), TypeAdapter(list[Tree])
JUDGED, SCORES = TypeAdapter(list[Judged]), TypeAdapter(list[Score])
FINISHES = TypeAdapter(list[Finish])


def to_json(batch: RolloutBatch) -> dict[str, Any]:
    """Serializes the batch of a step on rank zero; `from_json` restores an equal one. Every rank calls it."""
    rollouts = batch.all
    experts = fetch_experts(rollouts.traces, range(len(rollouts)) if is_rank_zero() else ())
    if not is_rank_zero():
        return {}
    problems = list(dict.fromkeys(rollouts.problems))
    numbers = {problem: number for number, problem in enumerate(problems)}
    # The trained traces are objects of `batch.all`.
    places = {id(trace): place for place, trace in enumerate(rollouts.traces)}
    return {
        # Their rows served the rewards, which are computed.
        "problems": PROBLEMS.dump_python([replace(p, columns={}) for p in problems], mode="json"),
        "problem": [numbers[problem] for problem in rollouts.problems],
        "traces": _traces_to_json(rollouts.traces, experts),
        "judged": JUDGED.dump_python(rollouts.judged, mode="json"),
        "scores": SCORES.dump_python(rollouts.scores, mode="json"),
        "kept": [places[id(trace)] for trace in batch.trained.traces],
        "rounds": batch.rounds,
        "times": dict(batch.times),
    }


def from_json(written: dict[str, Any]) -> RolloutBatch:
    """Restores the batch that `to_json` serialized."""
    problems = PROBLEMS.validate_python(written["problems"])
    rollouts = Rollouts(
        [problems[number] for number in written["problem"]],
        _traces_from_json(written["traces"]),
        JUDGED.validate_python(written["judged"]),
        SCORES.validate_python(written["scores"]),
    )
    trained = rollouts.groups(written["kept"], 1)
    times = written.get("times", {})  # not written before 0.2
    return RolloutBatch(rollouts, trained, written["rounds"], times)


def _traces_to_json(traces: Sequence[PackedTrace], experts: Mapping[int, bytes]) -> dict[str, Any]:
    outlines = [trace.outline for trace in traces]
    return {
        "lengths": [outline.length for outline in outlines],
        "prompts": [trace.prompt.tolist() for trace in traces],
        "finishes": [outline.finish for outline in outlines],
        "trees": TREES.dump_python([outline.tree for outline in outlines], mode="json"),
        **{name: _compressed([trace.column(name) for trace in traces]) for name in COLUMNS},
        "experts": [b64encode(zlib.compress(experts.get(i, b""))).decode() for i in range(len(traces))],
    }


def _traces_from_json(written: dict[str, Any]) -> list[PackedTrace]:
    stops = list(accumulate(written["lengths"]))
    spans = list(zip([0, *stops], stops, strict=False))
    if "barred" in written:  # its name before 0.2
        written = {**written, "suppressed": written["barred"]}
    columns = {name: _unpacked(written[name], kind) for name, kind in COLUMNS.items()}
    trees = TREES.validate_python(written["trees"])
    finishes = FINISHES.validate_python(written["finishes"])
    traces = []
    experts = written.get("experts", [""] * len(stops))  # not written before 0.2
    parts = zip(written["prompts"], finishes, trees, spans, experts, strict=True)
    for prompt, finish, tree, (start, stop), text in parts:
        tokens, sampled, suppressed, logprobs, versions = (
            tuple(columns[name][start:stop]) for name in COLUMNS
        )
        chosen = zlib.decompress(b64decode(text)) if text else b""
        trace = Trace(tuple(prompt), tokens, sampled, suppressed, logprobs, finish, tree, versions, chosen)
        traces.append(PackedTrace.of(trace))
    return traces


def _compressed(columns: Sequence[NDArray]) -> str:
    return b64encode(zlib.compress(b"".join(column.tobytes() for column in columns))).decode()


def _unpacked(text: str, kind: str) -> list[Any]:
    return np.frombuffer(zlib.decompress(b64decode(text)), kind).tolist()
