"""The native engine's handle on a written prefix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class NativeContext:
    """A row of the slot table. While a `sample` call is under way, draws.py keeps what moves.

    Attributes:
        position: of the next token.
        pending: tokens that are part of the context but not in the cache yet.
        logits_V: for the next token, until one is drawn; of a team, rank 0 alone has all of them.
        version: of the weights that made `logits_V`.
    """

    row: int
    position: int = 0
    pending: list[int] = field(default_factory=list)
    logits_V: torch.Tensor | None = None
    version: int = -1
