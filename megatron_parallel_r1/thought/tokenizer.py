"""Adds the six tags to a tokenizer and an embedding.

Unused rows of a released base model can be identical; trained from there, a model hardly ever writes a
well-formed block. So each new row starts at the mean of the trained rows plus noise of its own.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tags(tokenizer: PreTrainedTokenizerBase) -> Tags:
    """Adds the tags as single, non-special tokens, which `decode` shows, and returns their ids."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAG_TEXTS])
    return Tags.of(tokenizer)


def spread_new_embeddings(weight_VD: torch.Tensor, new_ids: Sequence[int], seed: int) -> None:
    """Sets the rows `new_ids` in place to the mean of all other rows plus 0.1 std of independent noise."""
    if not new_ids:
        return
    trained_V = torch.ones(weight_VD.shape[0], dtype=torch.bool)
    trained_V[list(new_ids)] = False
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rows_VD = weight_VD[trained_V.to(weight_VD.device)].float()
        noise_ND = torch.randn(len(new_ids), weight_VD.shape[1], generator=generator)
        new_ND = rows_VD.mean(0) + 0.1 * rows_VD.std(0) * noise_ND.to(weight_VD.device)
        weight_VD[list(new_ids)] = new_ND.to(weight_VD.dtype)
