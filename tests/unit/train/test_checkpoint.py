"""Stop and resume equals never stopped, bit for bit; half a checkpoint is none."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.train.checkpoint import Checkpoints
from megatron_parallel_r1.train.losses import sft_loss
from megatron_parallel_r1.train.trainer import Trainer
from tests.unit.rollout.tiny import native_engine, random_prompts, tiny_qwen3, traces_of
from tests.unit.train.test_exactness import micro_batches


def train(trainer: Trainer, steps: int) -> list[float]:
    traces = traces_of(native_engine(tiny_qwen3()), Thinking(max_response_tokens=60), random_prompts(8))
    batches = micro_batches(trainer, traces, "isolated", 300)
    return [
        trainer.update(batches, lambda logprobs_N, _: (sft_loss(logprobs_N), {}), 1e-3).loss
        for _ in range(steps)
    ]


def test_resume_is_bit_exact(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    whole = trainer_of()
    train(whole, 2)
    checkpoints.save(whole, 2, {"stream": {"position": 16}})
    after = train(whole, 2)

    resumed = trainer_of(seed=5)
    assert checkpoints.restore(resumed) == (2, {"stream": {"position": 16}})
    assert train(resumed, 2) == after
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_complete_checkpoints_count_and_few_are_kept(trainer_of, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    trainer = trainer_of()
    assert checkpoints.restore(trainer) == (0, {})
    train(trainer, 1)
    for step in (1, 2, 3):
        checkpoints.save(trainer, step, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    (tmp_path / ".step_000004").mkdir()
    assert checkpoints.restore(trainer)[0] == 3
