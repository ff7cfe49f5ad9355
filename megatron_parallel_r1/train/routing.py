"""Routing replay (R3, arXiv 2510.11370): the trainer's tokens go through the experts that the engine chose.

Two logits that nearly tie fall out one way in the engine and the other way in the trainer, and a token that
goes through another expert has another log-prob. Which experts a token takes is recorded; how much each
counts the trainer computes, so the router learns.

Shapes: T tokens that an engine recorded, L tokens of this rank's row, X layers, C experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.thought.packing import PackedRow, context_indices
from megatron_parallel_r1.train.micro_batch import BatchPartition


def recorded_experts(recorded: bytes, tokens: int, model: ModelConfig) -> NDArray[np.int16]:
    """Returns the experts [T, X, C] that the engine chose, for every token of a trace's row.

    Args:
        recorded: `Trace.experts`. The last token may be missing: nothing follows it, and its experts do not
            matter.
        tokens: of the row.
    """
    assert model.experts is not None
    size = (model.layers, model.experts.per_token)
    recorded_TXC = np.frombuffer(recorded, np.int16).reshape(-1, *size)
    missing = tokens - len(recorded_TXC)
    assert missing in (0, 1), f"{missing} tokens have no recorded experts"
    return np.concatenate([recorded_TXC, _any_experts(missing, *size)])


def row_experts(
    row: PackedRow, recorded: Mapping[int, NDArray[np.int16]], place: BatchPartition
) -> NDArray[np.int16]:
    """Returns the experts [L, X, C] of this rank's part of a packed row.

    Args:
        recorded: of each trace, by its index in `row.segment_ids`; one at least.
    """
    chosen = [recorded[index] for index in row.segment_ids]
    length = len(row) * place.context_size
    padding = _any_experts(length - sum(map(len, chosen)), *chosen[0].shape[1:])
    whole = np.concatenate([*chosen, padding])
    return whole[context_indices(length, place.context, place.context_size)]


def _any_experts(tokens: int, layers: int, per_token: int) -> NDArray[np.int16]:
    """Experts of tokens that no other token sees."""
    return np.broadcast_to(np.arange(per_token, dtype=np.int16), (tokens, layers, per_token))
