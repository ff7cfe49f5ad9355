"""What was made of a row's layout, remembered for as long as the layout lives: every layer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class LayoutMemo:
    """Keyed by the tensor itself, not by its numbers: to compare those would wait for the device.

    Activation checkpointing hands its layers a new tensor of the same numbers, for which all is made anew.
    """

    def __init__(self) -> None:
        self._made = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._made)

    def of(self, layout_KQ: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` made for this layout, unless the layout was written to since.

        Args:
            key: all else that the result depends on.
        """
        made = self._made.setdefault(layout_KQ, {})
        key = (layout_KQ._version, key)
        if key not in made:
            made[key] = make()
        return made[key]
