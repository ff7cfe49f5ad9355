"""Routing replay with a real SGLang server: the trainer takes the experts that the server chose."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rollout.servers.engine import ServerEngine
from megatron_parallel_r1.rollout.servers.pool import ServerPool
from megatron_parallel_r1.rollout.servers.sglang import SglangClient
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.rollout.thinking import Thinker, roll_out
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.trainer import Trainer
from tests.engines.isolated import STRICT
from tests.engines.servers import Shared
from tests.reference.traces import TAGS
from tests.serve.release import tokenizer
from tests.unit.rollout.tiny import random_prompts
from tests.unit.train.test_routing import SHAPE, TOLERANCE, difference, other_experts, trainer_of

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.xdist_group("experts")]


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with process.running(seed=1):
        yield trainer_of(torch.float32)


@pytest.fixture(scope="module")
def url(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server of the trainer's model, with the plugin."""
    folder = tmp_path_factory.mktemp("experts")
    save_hf_folder(folder / "model", SHAPE, hf_tensors(trainer.model), tokenizer())
    server = Shared(folder / "model", folder / "logs", isolated=True, env=STRICT)
    yield server.url
    server.end()


def traces_of(url: str, mode: Mode) -> list[Trace]:
    pool = ServerPool(SglangClient, (url,))
    pool.wait_ready()
    assert all(info.experts for info in pool.infos.values())
    thinking = Thinking(mode=mode, paths=3, max_depth=2, max_path_tokens=40, max_response_tokens=200)
    thinker = Thinker(ServerEngine(pool), TAGS, thinking, records_experts=True)
    return asyncio.run(roll_out(thinker, random_prompts(16), list(range(16))))


@pytest.mark.parametrize("mode", ["isolated", "replay"])
def test_the_trainer_takes_the_experts_that_the_server_chose(url: str, trainer: Trainer, mode: Mode) -> None:
    traces = traces_of(url, mode)
    assert sum(len(trace.tree.blocks) for trace in traces) > 5
    assert any(path.blocks for trace in traces for block in trace.tree.blocks for path in block.paths)
    found = difference(trainer, traces, mode, replays=True)
    print(f"{mode}: max |trainer - server| = {found:.2e}")
    assert found <= TOLERANCE
    others = [other_experts(trace) for trace in traces]
    assert difference(trainer, others, mode, replays=True) > 100 * TOLERANCE
