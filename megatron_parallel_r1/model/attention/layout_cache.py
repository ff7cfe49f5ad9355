"""Caches what is computed from a row's layout for as long as the layout lives; every layer needs it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Value = TypeVar("Value")


class LayoutCache:
    """Keyed by the tensor object, not by its values: comparing those would wait for the device.

    Activation checkpointing passes its layers a new tensor with the same values, which is a new entry.
    """

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, layout_KQ: Tensor, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Returns the cached value, or computes it; a layout that was written to is computed again.

        Args:
            key: everything else that the value depends on.
        """
        values: dict[Hashable, Value] = self._values.setdefault(layout_KQ, {})
        key = (layout_KQ._version, key)
        if key not in values:
            values[key] = compute()
        return values[key]
