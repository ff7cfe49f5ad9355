"""The memory that a computation takes at its worst, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made since it began that live at one time; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def know(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor out of the count."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                known = self._known.get(storage._cdata)
                if known is None or known[0].expired():
                    self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._known = {key: pair for key, pair in self._known.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _storage, size in self._known.values()))
        return result
