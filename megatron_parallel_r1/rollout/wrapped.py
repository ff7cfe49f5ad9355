"""An engine around another one: what concerns weights and the engine as a whole is the inner one's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic

import torch

from megatron_parallel_r1.rollout.base import Context, Engine
from megatron_parallel_r1.thought.layout import Mode


class Wrapped(Generic[Context]):
    """The half of an `Engine` that is alike in all wrappers; contexts are theirs to handle."""

    def __init__(self, engine: Engine[Context]) -> None:
        self._engine = engine

    @property
    def modes(self) -> frozenset[Mode]:
        return self._engine.modes

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def together(self) -> bool:
        return self._engine.together

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.load_weights(tensors, version)

    def offer_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.offer_weights(tensors, version)

    def interrupt(self) -> None:
        self._engine.interrupt()
