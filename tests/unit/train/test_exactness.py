"""Rollout and training agree: the trainer's log-prob of every sampled token is the engine's.

Covers DESIGN's second promise on one process: every mode, one to eight paths, several blocks, nesting, eos
and length cuts inside a path, packed rows, weights that came from the trainer.
"""

from __future__ import annotations

import pytest
import torch

from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rl.objective.mismatch import mismatch
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.sft.loop import sft_loss
from megatron_parallel_r1.thought.layout import Mode, lay_out
from megatron_parallel_r1.thought.packing import pack
from megatron_parallel_r1.thought.trace import Trace
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.train.trainer import Trainer
from tests.reference.formats import ALL, tags_of
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import eager_of, native_engine, random_prompts, tiny_qwen3, traces_of

TOLERANCE = 2e-5  # float32, logits of some units: a few hundred roundings of 6e-8


def micro_batches(trainer: Trainer, traces: list[Trace], mode: Mode, capacity: int) -> list[MicroBatch]:
    rows = [lay_out(t.prompt, t.tokens, t.sampled, t.tree, mode) for t in traces]
    values = {"engine": [t.logprobs for t in traces]}
    suppressed = [t.suppressed for t in traces]
    return [
        MicroBatch.of(row, trainer.device, values, suppressed, TAGS.parallel) for row in pack(rows, capacity)
    ]


def largest_difference(trainer: Trainer, batches: list[MicroBatch]) -> float:
    ours = torch.cat(trainer.logprobs(batches))
    return mismatch(ours, torch.cat([batch.values["engine"] for batch in batches])).max


@pytest.mark.parametrize("mode", ["isolated", "replay", "causal", "sequential"])
@pytest.mark.parametrize(("depth", "temperature"), [(1, 1.0), (2, 0.7)])
def test_trainer_equals_engine(trainer_of, mode: Mode, depth: int, temperature: float) -> None:
    trainer = trainer_of(temperature=temperature)
    engine = native_engine(tiny_qwen3())
    engine.load_weights(hf_tensors(trainer.model), version=1)
    thinking = Thinking(
        mode=mode,
        max_blocks=3,
        max_depth=depth,
        max_path_tokens=12,
        max_response_tokens=110,
        temperature=temperature,
    )
    paths = [1 + index % 8 for index in range(32)]
    traces = traces_of(engine, thinking, random_prompts(32), paths=paths)
    batches = micro_batches(trainer, traces, mode, capacity=400)
    assert 1 < len(batches) < 16
    worst = largest_difference(trainer, batches)
    print(f"{mode}, depth {depth}, temperature {temperature}: max |trainer - engine| = {worst:.2e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("mode", ["isolated", "replay"])
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"parallel_r1"}))
def test_trainer_equals_engine_in_every_format(trainer_of, name: str, mode: Mode) -> None:
    tags = tags_of(ALL[name])
    trainer = trainer_of(eager=eager_of(tags))
    engine = native_engine(tiny_qwen3(eager=eager_of(tags)))
    thinking = Thinking(
        mode=mode, paths=4, max_blocks=3, max_depth=2, max_path_tokens=130, max_response_tokens=900
    )
    traces = traces_of(engine, thinking, random_prompts(12), tags=tags)
    counts = {len(block.paths) for trace in traces for _, block in trace.tree.all_blocks()}
    assert counts == {4} if tags.plan_end is None else len(counts) >= 3
    assert max(trace.tree.depth for trace in traces) == 2
    assert largest_difference(trainer, micro_batches(trainer, traces, mode, capacity=800)) <= TOLERANCE


def test_they_still_agree_after_updates(trainer_of) -> None:
    trainer, engine = trainer_of(lr=1e-2), native_engine(tiny_qwen3())
    thinking = Thinking(paths=3, max_path_tokens=12, max_response_tokens=110)
    seen = []
    for version in range(1, 4):
        engine.load_weights(hf_tensors(trainer.model), version)
        traces = traces_of(engine, thinking, random_prompts(16, seed=version))
        batches = micro_batches(trainer, traces, "isolated", capacity=400)
        assert largest_difference(trainer, batches) <= TOLERANCE
        seen.append(trainer.update(batches, lambda logprobs_N, *_: (sft_loss(logprobs_N), {}), 1e-2))
    assert all(update.grad_norm > 0 for update in seen)
    # A wrong pairing of weights would show: the update moved the log-probs far beyond the tolerance.
    assert largest_difference(trainer, batches) > 1e-2


def test_the_wrong_layout_shows(trainer_of) -> None:
    trainer, engine = trainer_of(), native_engine(tiny_qwen3())
    thinking = Thinking(paths=3, max_path_tokens=12, max_response_tokens=110)
    traces = traces_of(engine, thinking, random_prompts(16))
    assert largest_difference(trainer, micro_batches(trainer, traces, "causal", 400)) > 100 * TOLERANCE


def test_an_update_does_not_depend_on_the_packing(trainer_of) -> None:
    traces = traces_of(native_engine(tiny_qwen3()), Thinking(max_response_tokens=110), random_prompts(24))
    norms, losses, weights = [], [], []
    for capacity in (110, 300, 5000):
        trainer = trainer_of()
        batches = micro_batches(trainer, traces, "isolated", capacity)
        update = trainer.update(batches, lambda logprobs_N, *_: (sft_loss(logprobs_N), {}), 1e-3)
        norms.append(update.grad_norm)
        losses.append(update.loss)
        weights.append(sum(p.double().abs().sum().item() for p in trainer.model.parameters()))
        assert update.targets == sum(trace.sampled_count for trace in traces)
    for figures in (norms, losses, weights):
        assert figures == pytest.approx([figures[0]] * 3, rel=1e-5)
