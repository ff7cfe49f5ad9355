"""Rotary positions of requests with blocks.

SGLang numbers positions by slots. A joined request only computes tokens after its last block, so its
positions are the slot numbers minus one constant (`requests.saved`), kept in a device table by the request's
row: a batch reads them by its `req_pool_indices`, and the replay of a captured graph copies them with its
other inputs.

Shapes: P rows of the pool, B requests of a batch, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from megatron_parallel_r1.rollout.sglang_plugin.requests import saved

TABLE = "parallel_r1_saved"


def make_table(pool: Any) -> None:
    """int64 [P] of zeros, on the device of the pool."""
    rows = pool.req_to_token.shape[0]
    setattr(pool, TABLE, torch.zeros(rows, dtype=torch.int64, device=pool.req_to_token.device))


def note_saved(result: None, batch: ScheduleBatch) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`: each request that gets a row sets its entry, ordinary
    requests to 0."""
    saved_B = torch.tensor([saved(req) for req in batch.reqs], dtype=torch.int64)
    saved_P = getattr(batch.req_to_token_pool, TABLE)
    saved_P[batch.req_pool_indices] = saved_B.to(saved_P.device, non_blocking=True)


def shift(
    result: ForwardBatch, cls: type, batch: ScheduleBatch, model_runner: Any, *args: Any, **named: Any
) -> None:
    """AFTER `ForwardBatch.init_new`: creates a new tensor of positions, for the old one may be shared."""
    if result.forward_mode.is_idle() or not any(saved(req) for req in batch.reqs):
        return
    saved_B = getattr(model_runner.req_to_token_pool, TABLE)[result.req_pool_indices]
    if result.forward_mode.is_decode():
        result.positions = result.positions - saved_B
        return
    tokens = result.positions.shape[0]
    saved_T = torch.repeat_interleave(saved_B, result.extend_seq_lens.long(), output_size=tokens)
    result.positions = result.positions - saved_T
    setattr(result, TABLE, saved_B)


def sample(
    original: Callable[..., torch.Tensor], runner: Any, logits: Any, batch: ForwardBatch
) -> torch.Tensor:
    """AROUND `ModelRunner.sample`: seeded draws are keyed by position. In a decode SGLang uses the batch's
    rotary positions; in a prefill the last slot's number, which is converted here, so that a retracted
    request draws the same tokens again. The native engine keys its draws the same way."""
    saved_B = getattr(batch, TABLE, None)
    if saved_B is None:
        return original(runner, logits, batch)
    lengths = batch.seq_lens
    batch.seq_lens = lengths - saved_B
    try:
        return original(runner, logits, batch)
    finally:
        batch.seq_lens = lengths
