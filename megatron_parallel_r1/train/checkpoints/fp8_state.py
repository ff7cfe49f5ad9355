"""Layer state besides parameters: the histories of FP8's delayed scaling.

Transformer Engine exposes them as a module's extra state, opaque bytes; Megatron determines which rank saves
which, and the names. All ranks of a pipeline stage hold the same, since the largest numbers are reduced over
them, so a run may resume under another layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from torch import Tensor

from megatron_parallel_r1.model.gpt import Model, PathGPT

FILE = "extra_states.safetensors"
# Without it Transformer Engine reads no extra state of delayed scaling, which is a pickle.
TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def extra_states(model: Model) -> dict[str, Tensor]:
    """Copies (uint8) of the extra states that this rank saves; layers without any are omitted."""
    return {
        entry.unique_key: entry.data.to("cpu", copy=True)
        for stage in model
        for _, entry in _described(stage)
        if entry.data is not None and entry.data.numel() and is_main_replica(entry.replica_id)
    }


def set_extra_states(model: Model, states: Mapping[str, Tensor]) -> None:
    """Restores the extra state of each layer of this rank.

    Args:
        states: extra states of all layers. They are pickles, which can run code: take them only from a
            checkpoint whose digests have been checked.
    """
    with _trusted():
        for stage in model:
            own = {
                n: states[entry.unique_key] for n, entry in _described(stage) if entry.unique_key in states
            }
            if own:
                stage.load_state_dict(own, strict=False)


def _described(stage: PathGPT) -> Iterator[tuple[str, ShardedObject]]:
    """Extra states by the names of the stage's `load_state_dict`."""
    described = stage.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    yield from ((name, entry) for name, entry in described.items() if isinstance(entry, ShardedObject))


@contextmanager
def _trusted() -> Iterator[None]:
    before = os.environ.get(TRUST)
    os.environ[TRUST] = "1"
    try:
        yield
    finally:
        del os.environ[TRUST]
        if before is not None:
            os.environ[TRUST] = before
