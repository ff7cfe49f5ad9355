"""Batches that are rolled out and not yet trained, as JSON for a checkpoint; they come back bit for bit.

What a trace has for each token is a column over all traces of the batch: numbers, compressed, in base64. A
trace of 32k tokens would be a JSON list of 160k members otherwise.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megatron_parallel_r1.data.problems import Problem
from megatron_parallel_r1.rewards.base import Judged, Score
from megatron_parallel_r1.rl.rollout_batch import RolloutBatch, Rollouts
from megatron_parallel_r1.thought.trace import Finish, Trace
from megatron_parallel_r1.thought.tree import Tree

# Of a trace, one value a token.
COLUMNS = {"tokens": "<i4", "sampled": "|b1", "suppressed": "|b1", "logprobs": "<f8", "versions": "<i4"}
PROBLEMS, TREES = TypeAdapter(list[Problem]), TypeAdapter(list[Tree])
JUDGED, SCORES = TypeAdapter(list[Judged]), TypeAdapter(list[Score])
FINISHES = TypeAdapter(list[Finish])


def to_json(batch: RolloutBatch) -> dict[str, Any]:
    """A batch of a step; `from_json` gives an equal one."""
    every = batch.all
    problems = list(dict.fromkeys(every.problems))
    numbers = {problem: number for number, problem in enumerate(problems)}
    # What is kept are some of all the traces, the very objects.
    places = {id(trace): place for place, trace in enumerate(every.traces)}
    return {
        "problems": PROBLEMS.dump_python(problems, mode="json"),
        "problem": [numbers[problem] for problem in every.problems],
        "traces": _traces_to_json(every.traces),
        "judged": JUDGED.dump_python(every.judged, mode="json"),
        "scores": SCORES.dump_python(every.scores, mode="json"),
        "kept": [places[id(trace)] for trace in batch.trained.traces],
        "rounds": batch.rounds,
    }


def from_json(written: dict[str, Any]) -> RolloutBatch:
    """What `to_json` was given."""
    problems = PROBLEMS.validate_python(written["problems"])
    every = Rollouts(
        [problems[number] for number in written["problem"]],
        _traces_from_json(written["traces"]),
        JUDGED.validate_python(written["judged"]),
        SCORES.validate_python(written["scores"]),
    )
    return RolloutBatch(every, every.groups(written["kept"], 1), written["rounds"])


def _traces_to_json(traces: Sequence[Trace]) -> dict[str, Any]:
    columns = {name: [value for t in traces for value in getattr(t, name)] for name in COLUMNS}
    return {
        "lengths": [len(trace.tokens) for trace in traces],
        "prompts": [list(trace.prompt) for trace in traces],
        "finishes": [trace.finish for trace in traces],
        "trees": TREES.dump_python([trace.tree for trace in traces], mode="json"),
        **{name: _packed(values, COLUMNS[name]) for name, values in columns.items()},
    }


def _traces_from_json(written: dict[str, Any]) -> list[Trace]:
    stops = list(accumulate(written["lengths"]))
    spans = list(zip([0, *stops], stops, strict=False))
    if "barred" in written:  # its name before 0.2
        written = {**written, "suppressed": written["barred"]}
    columns = {name: _unpacked(written[name], kind) for name, kind in COLUMNS.items()}
    trees = TREES.validate_python(written["trees"])
    finishes = FINISHES.validate_python(written["finishes"])
    traces = []
    for prompt, finish, tree, (start, stop) in zip(written["prompts"], finishes, trees, spans, strict=True):
        tokens, sampled, suppressed, logprobs, versions = (
            tuple(columns[name][start:stop]) for name in COLUMNS
        )
        traces.append(Trace(tuple(prompt), tokens, sampled, suppressed, logprobs, finish, tree, versions))
    return traces


def _packed(values: Sequence[float], kind: str) -> str:
    return b64encode(zlib.compress(np.asarray(values, kind).tobytes())).decode()


def _unpacked(text: str, kind: str) -> list[Any]:
    return np.frombuffer(zlib.decompress(b64decode(text)), kind).tolist()
