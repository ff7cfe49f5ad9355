"""Rows as in training: a trace with blocks of sibling paths, alone or packed with others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_parallel_r1.thought.layout import Mode, Row, lay_out
from megatron_parallel_r1.thought.packing import PackedRow, concatenate
from megatron_parallel_r1.thought.parser import parse
from megatron_parallel_r1.thought.tags import Tags

TAGS = Tags(parallel=0, parallel_end=1, path=2, path_end=3, summary=4, summary_end=5, eos=6)
FIRST_WORD = 7


def trace_row(length: int, mode: Mode, vocab: int, blocks: int = 2, paths: int = 4) -> Row:
    """A trace of `length` tokens, four fifths of them in the paths of its blocks.

    Args:
        mode: `causal` sees all paths, `sequential` has none.
    """
    path = length * 4 // 5 // (blocks * paths) - 2
    words = iter(np.random.default_rng(length).integers(FIRST_WORD, vocab, 2 * length).tolist())

    def text(count: int) -> list[int]:
        return [next(words) for _ in range(count)]

    inside = [token for _ in range(paths) for token in (TAGS.path, *text(path), TAGS.path_end)]
    block = [TAGS.parallel, *inside, TAGS.parallel_end, TAGS.summary, *text(4), TAGS.summary_end]
    tokens = [*text(4)]
    for _ in range(blocks):
        tokens += block
    prompt = text(length - len(tokens) - 1)
    tokens.append(TAGS.eos)
    if mode == "sequential":
        tokens = [*text(len(tokens) - 1), TAGS.eos]
    tree = parse(tokens, TAGS)
    forced = tree.forced()
    return lay_out(prompt, tokens, [index not in forced for index in range(len(tokens))], tree, mode)


def timed_rows(length: int, vocab: int = 1000) -> dict[str, PackedRow]:
    """Rows by name, of exactly `length` tokens; of at least `length` under replay."""
    return {
        "causal": concatenate([trace_row(length, "sequential", vocab)], [0]),
        "isolated": concatenate([trace_row(length, "isolated", vocab)], [0]),
        "isolated, 4 packed": concatenate([trace_row(length // 4, "isolated", vocab)] * 4, range(4)),
        "replay": concatenate([trace_row(length, "replay", vocab)], [0]),
    }


def visible_pairs(layout_KL: np.ndarray) -> int:
    """Number of visible (query, key) pairs; assumes that hidden intervals do not overlap."""
    index_L, start_L, *hidden_L = layout_KL.astype(np.int64)
    hidden = sum((hi_L - lo_L).sum() for lo_L, hi_L in zip(hidden_L[::2], hidden_L[1::2], strict=True))
    return int((index_L + 1 - start_L).sum() - hidden)


def dense_mask(layout_KL: Tensor) -> Tensor:
    """[L, L] bool, the mask for torch's attention without path attention."""
    key_L = torch.arange(layout_KL.shape[1], device=layout_KL.device)
    index_L1, start_L1, *hidden_L1 = layout_KL[:, :, None]
    sees_LL = (start_L1 <= key_L) & (key_L <= index_L1)
    for lo_L1, hi_L1 in zip(hidden_L1[::2], hidden_L1[1::2], strict=True):
        sees_LL &= (key_L < lo_L1) | (hi_L1 <= key_L)
    return sees_LL
