"""Micro-batches through Megatron's schedule add up to one backward of the whole, and a step is Adam's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.model import gpt, weights
from megatron_parallel_r1.train.trainer import Adam, wrap_for_training
from tests.unit.model.qwen3 import hf_model
from tests.unit.model.rows import Row, random_row

pytestmark = pytest.mark.usefixtures("world")
ROWS = [random_row(seed, documents=2) for seed in (1, 2, 3)]


def fresh(dtype: torch.dtype = torch.float32) -> gpt.Model:
    theirs = hf_model(tied=True)
    model = gpt.build_model(ModelConfig.from_hf(theirs.config.to_dict()), dtype)
    weights.load_hf_tensors(model, theirs.state_dict().items())
    return model


def loss_and_count(logits_1LV: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Summed cross entropy over every third token."""
    labels_L = torch.arange(len(row)) % 97
    labels_L[torch.arange(len(row)) % 3 > 0] = -100
    loss = F.cross_entropy(logits_1LV[0].float(), labels_L, reduction="sum")
    return loss, (labels_L >= 0).sum().int()


def forward_step(rows: Iterator[Row], model: nn.Module) -> tuple[Tensor, Any]:
    row = next(rows)
    hidden_T1E = model(tokens_of(row), row.positions_1L, row.layout_KL)

    def loss_func(hidden_T1E: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        stage = model.module
        logits_LV = stage.whole_hidden(hidden_T1E) @ stage.head_weight().T
        loss, count = loss_and_count(logits_LV[None], row)
        return loss, count, {"loss": loss.item(), "count": count.item()}

    return hidden_T1E, loss_func


def tokens_of(row: Row) -> Tensor:
    return torch.randint(0, 97, (1, len(row)), generator=torch.Generator().manual_seed(len(row)))


def accumulate(wrapped: nn.Module, rows: list[Row]) -> list[dict[str, float]]:
    wrapped.zero_grad_buffer()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=[wrapped],
        num_microbatches=len(rows),
        seq_length=max(len(row) for row in rows),
        micro_batch_size=1,
    )


def test_micro_batches_add_up_to_the_mean_over_their_tokens() -> None:
    assert len({len(row) for row in ROWS}) == len(ROWS)
    whole = fresh()
    outputs = [gpt.logits(whole, tokens_of(row), row.positions_1L, row.layout_KL) for row in ROWS]
    losses, counts = zip(*map(loss_and_count, outputs, ROWS), strict=True)
    (sum(losses) / sum(counts)).backward()

    (wrapped,), _ = wrap_for_training(fresh(), Adam(lr=1e-3))
    for _ in range(2):  # the second time from a buffer that was used before
        reports = accumulate(wrapped, ROWS)
    assert [report["loss"] for report in reports] == pytest.approx([loss.item() for loss in losses])
    grads = {name: parameter.main_grad for name, parameter in wrapped.module.named_parameters()}
    for name, parameter in whole[0].named_parameters():
        assert (grads[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


def test_a_step_is_that_of_adamw_with_clipping_and_no_decay_of_norms() -> None:
    adam = Adam(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, clip=0.5)
    (wrapped,), optimizer = wrap_for_training(fresh(), adam)
    reference = fresh()
    parameters = dict(reference[0].named_parameters())
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim == 1]
    expected = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    for step in range(3):
        optimizer.zero_grad()
        accumulate(wrapped, ROWS[step:])
        for name, parameter in wrapped.module.named_parameters():
            parameters[name].grad = parameter.main_grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        expected.step()
        done, grad_norm, _zeros = optimizer.step()
        assert done and norm > 0.5 and grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in wrapped.module.named_parameters():
        assert (parameter - parameters[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_lower_the_loss_and_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    def train() -> list[float]:
        (wrapped,), optimizer = wrap_for_training(fresh(dtype), Adam(lr=3e-3))
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            reports = accumulate(wrapped, ROWS[:2])
            optimizer.step()
            curve.append(sum(r["loss"] for r in reports) / sum(r["count"] for r in reports))
        return curve

    first = train()
    assert first[-1] < first[0] - 0.5
    assert first == train()
