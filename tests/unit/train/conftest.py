"""A world of one process, and a trainer of the tiny Qwen3 that the rollout tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.distributed import process
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.unit.rollout.tiny import EAGER, tiny_qwen3


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with process.running(seed=1):
        yield


@pytest.fixture
def trainer_of() -> Callable[..., Trainer]:
    def make(
        seed: int = 0, lr: float = 1e-3, temperature: float = 1.0, eager: Mapping[int, float] = EAGER
    ) -> Trainer:
        hf = tiny_qwen3(seed, eager=eager)
        model = build_model(ModelConfig.from_hf(hf.config.to_dict()))
        load_hf_tensors(model, hf.state_dict().items())
        return Trainer(model, Adam(lr=lr), temperature)

    return make
