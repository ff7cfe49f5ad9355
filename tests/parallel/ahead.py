"""Batches rolled out ahead by several processes, while their main threads meet too; see test_ahead.py.

torchrun --nproc-per-node 2 -m tests.parallel.ahead OUT.json "team=1" "team=2 staleness=2"

One case after the other. World / team copies share each batch. What the training would change of the weights
is made up here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import Qwen3ForCausalLM

from megatron_parallel_r1.config.objective import DynamicSampling
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.data.embedded.generate import build_tokenizer, training_problem
from megatron_parallel_r1.data.embedded.traces import stated_result
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.distributed.collectives import all_gather_objects, background_groups
from megatron_parallel_r1.distributed.parallel_config import ParallelConfig
from megatron_parallel_r1.rewards.base import Judged
from megatron_parallel_r1.rewards.registry import make_reward
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.rl.rollout_queue import open_queue
from megatron_parallel_r1.rl.rollout_worker import RolloutWorker
from megatron_parallel_r1.rollout.native.tensor_parallel import TensorParallelGroup
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.tokenizer import add_tags
from megatron_parallel_r1.utils.rank import is_rank_zero
from megatron_parallel_r1.utils.timers import Timers
from tests.parallel.launch import settings_of
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3

STEPS, SAMPLES = 4, 4
THINKING = Thinking(max_path_tokens=8, max_response_tokens=40)


def short(judged: Judged, step: int) -> float:
    """A reward that an untrained model earns now and then, so that some groups are not kept.

    It differs from rank to rank, as those of a judge do.
    """
    return float(judged.length < 15) + 1e-3 * dist.get_rank()


def copies() -> int:
    """Copies of the model."""
    return parallel_state.get_data_parallel_world_size()


def weights(model: Qwen3ForCausalLM, version: int) -> Iterator[tuple[str, torch.Tensor]]:
    """As after so many updates; the main threads of all processes meet for each tensor."""
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        update = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(97 * version + number))
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
        yield name, tensor + 0.02 * version * update


def stage(team: TensorParallelGroup, world: dist.ProcessGroup, k: int) -> list[Any]:
    """Of each batch: how many rounds, which problems, and the traces that were rolled out."""
    tokenizer = build_tokenizer()
    tags = add_tags(tokenizer)
    model = tiny_qwen3(vocabulary=len(tokenizer))
    engine = native_engine(model, team)
    stream = ProblemStream(partial(training_problem, "easy", 5), seed=0)
    thinker = Thinker(engine, tags, THINKING)
    found = []
    with Verifier() as verifier:
        worker = RolloutWorker(
            RlStage(
                name="rl",
                kind="rl",
                data={"source": "embedded", "kind": "easy"},
                steps=STEPS,
                prompts_per_step=3,
                samples_per_prompt=SAMPLES,
                dynamic_sampling=DynamicSampling(max_rounds=3),
                max_off_policy_steps=k,
                max_concurrent_rollouts=64,
                optimizer={"lr": 1.0},
            ),
            stream,
            thinker,
            tokenizer,
            verifier,
            seed=11,
            reward=make_reward("tests.parallel.ahead:short"),
            template="plain",
            read_result=stated_result,
            timers=Timers(),
            folder=Path(),
            world=world,
        )
        with open_queue(worker, worker.stage, done=0, pending=None) as rollouts:
            for step in range(1, STEPS + 1):
                rollouts.update_weights(weights(model, step - 1), version=step - 1)
                batch = rollouts.next_batch(step)
                # Each trace has the figure of one rank everywhere.
                rewards = all_gather_objects(batch.all.rewards)
                assert all(other == rewards[0] for other in rewards)
                assert {round(1e3 * (reward % 0.5)) for reward in rewards[0]} == set(range(copies()))
                for _ in range(50):
                    dist.all_reduce(torch.ones(1))
                unpacked = [trace.unpack() for trace in batch.all.traces]
                traces = [(t.tokens, t.versions, t.logprobs) for t in unpacked]
                found.append((batch.rounds, [p.id for p in batch.trained.problems], traces))
    return found


def crossing(team: TensorParallelGroup) -> list[Any]:
    """Traces of a team whose ranks are offered new weights at different passes."""
    tokenizer = build_tokenizer()
    tags = add_tags(tokenizer)
    model = tiny_qwen3(vocabulary=len(tokenizer))
    engine = native_engine(model, team)

    async def write() -> list[Any]:
        async def offer() -> None:
            for version in (1, 2, 3):
                while engine.computed_tokens < 60 * version + 25 * team.rank:
                    await asyncio.sleep(0)
                engine.offer_weights(weights_alone(version), version)

        offering = asyncio.ensure_future(offer())
        traces = await roll_out(Thinker(engine, tags, THINKING), random_prompts(12), list(range(12)))
        await offering
        return [(trace.tokens, trace.versions) for trace in traces]

    def weights_alone(version: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            yield name, tensor + 0.01 * version

    return asyncio.run(write())


def main() -> None:
    out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        settings = {"team": 1, "staleness": 1} | settings_of(case)
        with (
            process.running(seed=1, parallel=ParallelConfig(tensor=settings["team"])),
            background_groups(timeout_s=120) as (tensor, world),
        ):
            team = TensorParallelGroup.of(tensor)
            results = {"batches": stage(team, world, settings["staleness"]), "crossing": crossing(team)}
            found[case] = all_gather_objects(results)
    if is_rank_zero():
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
