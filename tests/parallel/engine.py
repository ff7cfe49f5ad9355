"""Traces of a native engine that a team of processes shares; run by torchrun, see test_engine.py.

torchrun --nproc-per-node 4 -m tests.parallel.engine OUT.json "team=4" "team=2"

One case after the other; `tied` says that the model's output matrix is its embedding. World / team teams
decode at once, each with its own prompts, as under data parallelism.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3ForCausalLM

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.trace import Trace
from tests.parallel.launch import settings_of
from tests.unit.rollout.test_exactness import largest_difference
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of

MODES = ("isolated", "replay", "causal", "sequential")
ODD = {"vocabulary": 41, "ffn": 47}  # Neither 2 nor 4 divides them.
# Of random models whose likeliest tokens open blocks, by the size of the team (and kv heads).
SEEDS = {2: 4, 4: 2}


def decoded(engine: NativeEngine, temperature: float, mode: str, prompts: list[list[int]]) -> dict[str, Any]:
    """What an engine drew, how likely it was, and how many rows that took."""
    thinking = Thinking(
        mode=mode,
        max_depth=2,
        paths=3,
        max_blocks=2,
        max_path_tokens=12,
        max_response_tokens=80,
        temperature=temperature,
    )
    before = engine.computed_tokens
    traces = traces_of(engine, thinking, prompts)
    return {"traces": traces, "rows": engine.computed_tokens - before}


def team_agrees(team: TensorParallelGroup, found: dict[str, Any]) -> bool:
    """Whether all ranks hold the same, to the bit."""
    gathered: list[Any] = [None] * team.size
    dist.all_gather_object(gathered, found, group=team.group)
    return all(other == found for other in gathered)


def compared(found: list[Trace], expected: list[Trace]) -> float:
    """The largest difference of log-probs; infinite if a token differs."""
    if [trace.tokens for trace in found] != [trace.tokens for trace in expected]:
        return float("inf")
    return max(
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


def modes_of(model: Qwen3ForCausalLM, team: TensorParallelGroup, prompts: list[list[int]]) -> dict[str, Any]:
    """Of each mode: greedy traces against one process's, sampled ones against a recomputation."""
    shared, alone = native_engine(model, team, max_rows=20), native_engine(model)
    found: dict[str, Any] = {}
    for mode in MODES:
        greedy, sampled = (decoded(shared, temperature, mode, prompts) for temperature in (0.0, 1.0))
        expected = decoded(alone, 0.0, mode, prompts)
        found[mode] = {
            "agrees": team_agrees(team, greedy) and team_agrees(team, sampled),
            "greedy": compared(greedy["traces"], expected["traces"]),
            "sampled": largest_difference(model, sampled["traces"], mode),
            "rows": [greedy["rows"], expected["rows"]],
            "blocks": [sum(len(trace.tree.blocks) for trace in kind["traces"]) for kind in (greedy, sampled)],
        }
    return found


def parted(model: Qwen3ForCausalLM, team: TensorParallelGroup) -> dict[str, str]:
    """What this rank is told, by cause, when the team's last rank is asked for something else."""
    last = team.rank == team.size - 1

    def many(engine: NativeEngine) -> None:
        traces_of(engine, Thinking(), random_prompts(5 if last else 4))

    def other(engine: NativeEngine) -> None:
        traces_of(engine, Thinking(), [[9, 10], [9, 11 if last else 12]])

    def early(engine: NativeEngine) -> None:
        async def write() -> None:
            context = engine.open()
            await engine.write(context, [9, 10])
            if not last:
                await engine.write(context, [11])
            engine.close(context)

        asyncio.run(write())

    def weights(engine: NativeEngine) -> None:
        engine.load_weights(model.state_dict().items(), version=2 if last else 1)

    results = {}
    for cause in (many, other, early, weights):
        try:
            cause(native_engine(model, team))
            results[cause.__name__] = "nothing"
        except RuntimeError as error:
            results[cause.__name__] = str(error)
    return results


def found_in(team: TensorParallelGroup, tied: bool, number: int) -> list[dict[str, Any]]:
    """What each process of the world found.

    Args:
        number: of this process's team.
    """
    model = tiny_qwen3(SEEDS[team.size], tied, kv_heads=team.size, **ODD)
    found = modes_of(model, team, random_prompts(12, seed=number))
    report = {"modes": found, "parted": parted(model, team), "refused": ""}
    try:
        native_engine(tiny_qwen3(kv_heads=1), team)
    except UserError as error:
        report["refused"] = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, report)
    return everyone


def main() -> None:
    out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case in cases:
        settings = settings_of(case)
        size = settings["team"]
        starts = range(0, dist.get_world_size(), size)
        groups = [dist.new_group(range(start, start + size)) for start in starts]
        number = dist.get_rank() // size
        found[case] = found_in(TensorParallelGroup.of(groups[number]), "tied" in settings, number)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
