"""Rotary positions of requests with blocks.

SGLang numbers what it computes by slots. All that a joined request computes lies behind its last block, so
its positions are those minus one constant (`request.saved`), kept in a table on the device by the request's
row: a batch takes them by the `req_pool_indices` that it has there anyway, and a captured graph's replay
copies them in with its other inputs.

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
    """AFTER `ScheduleBatch.prepare_for_extend`: each request that gets a row sets its entry, ordinary ones
    to 0."""
    saved_B = torch.tensor([saved(req) for req in batch.reqs], dtype=torch.int64)
    saved_P = getattr(batch.req_to_token_pool, TABLE)
    saved_P[batch.req_pool_indices] = saved_B.to(saved_P.device, non_blocking=True)


def shift(
    result: ForwardBatch, cls: type, batch: ScheduleBatch, model_runner: Any, *args: Any, **named: Any
) -> None:
    """AFTER `ForwardBatch.init_new`: a new tensor of positions, for the old one may be shared."""
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
    """AROUND `ModelRunner.sample`: a seeded draw is keyed by position. In a decode SGLang takes the batch's,
    which are rotary; in a prefill the last slot's number, which is brought to the same measure here, so that
    a retracted request draws again what it drew. The native engine keys its draws so too."""
    saved_B = getattr(batch, TABLE, None)
    if saved_B is None:
        return original(runner, logits, batch)
    lengths = batch.seq_lens
    batch.seq_lens = lengths - saved_B
    try:
        return original(runner, logits, batch)
    finally:
        batch.seq_lens = lengths
