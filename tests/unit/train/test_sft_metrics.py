"""The loss of tags and of held-out examples, beside the loss that SFT trains."""

from __future__ import annotations

import pytest

from benchmarks.gpu.rows import trace_row
from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.model.gpt import build_model
from megatron_parallel_r1.model.weights import load_hf_tensors, random_hf_tensors
from megatron_parallel_r1.sft.loop import held_out_metrics, sft_step, tag_loss
from megatron_parallel_r1.train.micro_batch import MicroBatch, partition_rows
from megatron_parallel_r1.train.trainer import Adam, Trainer


def test_losses_of_tags_and_of_held_out_rows_are_those_of_the_same_targets() -> None:
    shape = ModelConfig(32, 1, 4, 2, 8, ffn=48, vocab=64, max_positions=512)
    rows = [trace_row(100 + extra, "isolated", 64, blocks=1, paths=2) for extra in range(3)]
    tags = (3, 5, 11)  # whichever tokens: they are targets like others
    model = build_model(shape)
    load_hf_tensors(model, random_hf_tensors(shape, 0))
    trainer = Trainer(model, Adam(1e-3))
    batches = [MicroBatch.of(row, trainer.device) for row in partition_rows(rows, 130, trainer.partition)]
    losses = [
        (label, -logprob)
        for batch, logprobs_N in zip(batches, trainer.logprobs(batches), strict=True)
        for label, logprob in zip(batch.labels_N.tolist(), logprobs_N.tolist(), strict=True)
    ]
    held_out = held_out_metrics(trainer, rows, 130, tags)
    update = sft_step(trainer, rows, 130, 1e-3, tags)
    after = held_out_metrics(trainer, rows, 130, (64,))
    of_tags = [loss for label, loss in losses if label in tags]
    mean = sum(loss for _, loss in losses) / len(losses)
    assert of_tags and held_out["held_out_loss"] == pytest.approx(mean, rel=1e-5)
    assert update.loss == pytest.approx(mean, rel=1e-5)
    assert held_out["held_out_tag_loss"] == pytest.approx(sum(of_tags) / len(of_tags), rel=1e-5)
    assert tag_loss(update.means) == pytest.approx(held_out["held_out_tag_loss"], rel=1e-5)
    assert after["held_out_tag_loss"] is None and after["held_out_loss"] < mean
