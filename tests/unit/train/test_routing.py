"""Routing replay: the trainer's tokens go through the experts that the engine chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_parallel_r1.architecture.model_config import ExpertsConfig, ModelConfig
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import hf_tensors, load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.rl.learner import BatchConfig, Learner
from megatron_parallel_r1.rl.packed_trace import PackedTrace
from megatron_parallel_r1.rollout.native.engine import NativeEngine
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.layout import Mode
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.trainer import Adam, Trainer
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import EAGER, random_prompts, traces_of

SHAPE = ModelConfig(
    *(32, 2, 4, 2, 16, 48, 40),
    rope_theta=1e3,
    tied=False,
    family="qwen3_moe",
    experts=ExpertsConfig(count=16, per_token=4, ffn=24),
)
TOLERANCE = 2e-5  # float32, as in test_exactness.py
# bfloat16 rounds logits of some units at 2^-8, in the engine and in the trainer.
TOLERANCE_BFLOAT16 = 0.1


def trainer_of(dtype: torch.dtype) -> Trainer:
    tensors = dict(random_hf_tensors(SHAPE, seed=0, std=0.2))
    tensors["model.embed_tokens.weight"][:, 0] = 8.0  # a feature that every hidden state has; see tiny.py
    head_VE = tensors["lm_head.weight"]
    head_VE[:, 0] = 0.0
    for token, nats in EAGER.items():
        head_VE[token] = 0.0
        head_VE[token, 0] = (nats + 1.2) / 3.1
    model = build_model(SHAPE, dtype)
    load_hf_tensors(model, tensors.items())
    return Trainer(model, Adam(lr=1e-3))


def traces_under(trainer: Trainer, mode: Mode) -> list[Trace]:
    engine = NativeEngine(SHAPE)
    engine.load_weights(hf_tensors(trainer.model), version=1)
    thinking = Thinking(mode=mode, paths=3, max_depth=2, max_path_tokens=40, max_response_tokens=200)
    return traces_of(engine, thinking, random_prompts(24), records_experts=True)


def difference(trainer: Trainer, traces: Sequence[Trace], mode: Mode, replays: bool) -> float:
    batch = BatchConfig(1, epochs=1, mini_batches=1, micro_tokens=400, max_response_tokens=110)
    learner = Learner(trainer, Objective(replay_experts=replays), batch, mode, TAGS)
    batches = list(learner.prepare([PackedTrace.of(trace) for trace in traces]).micro_batches())
    assert len(batches) > 1
    assert all((batch.experts_LXC is not None) == replays for batch in batches)
    engine = torch.cat([batch.values["engine"] for batch in batches])
    return float((torch.cat(trainer.logprobs(batches)) - engine).abs().max())


def other_experts(trace: Trace) -> Trace:
    chosen = 15 - np.frombuffer(trace.experts, np.int16)
    return replace(trace, experts=chosen.tobytes())


@pytest.mark.parametrize("mode", ["isolated", "causal", "replay"])
def test_the_trainer_takes_the_recorded_experts(mode: Mode) -> None:
    trainer = trainer_of(torch.float32)
    traces = traces_under(trainer, mode)
    assert sum(len(trace.tree.blocks) for trace in traces) > 8
    assert difference(trainer, traces, mode, replays=True) <= TOLERANCE
    assert difference(trainer, traces, mode, replays=False) <= TOLERANCE
    others = [other_experts(trace) for trace in traces]
    assert difference(trainer, others, mode, replays=True) > 100 * TOLERANCE


def test_bfloat16_moves_no_single_log_prob() -> None:
    trainer = trainer_of(torch.bfloat16)
    traces = traces_under(trainer, "isolated")
    again, replayed = (difference(trainer, traces, "isolated", replays) for replays in (False, True))
    print(f"bfloat16: max |trainer - engine| = {again:.3f} where the router chooses, {replayed:.3f} replayed")
    assert replayed <= TOLERANCE_BFLOAT16
    assert replayed <= again
