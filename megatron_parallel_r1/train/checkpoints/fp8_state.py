"""What layers remember from step to step beside parameters: the histories of FP8's delayed scaling.

Transformer Engine hands them out as a module's extra state, bytes that only it reads; Megatron says which
process saves which, and under what name. All processes of a pipeline stage have the same, since the largest
numbers are reduced over them, so a run may go on under another layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from torch import Tensor
from torch.nn import Module

from megatron_parallel_r1.model.gpt import Model

FILE = "extra_states.safetensors"
# Without it Transformer Engine reads no extra state of delayed scaling, which is a pickle.
TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def extra_states(model: Model) -> dict[str, Tensor]:
    """Copies (uint8) of those that this process saves; layers that have nothing to remember are left out."""
    return {
        entry.unique_key: entry.data.to("cpu", copy=True)
        for stage in model
        for _, entry in _described(stage)
        if entry.data is not None and entry.data.numel() and is_main_replica(entry.replica_id)
    }


def set_extra_states(model: Model, states: Mapping[str, Tensor]) -> None:
    """Gives each layer of this process what was kept of it.

    Args:
        states: of all layers. Their bytes are run as a program (a pickle): take them only from a checkpoint
            whose digests have been checked.
    """
    with _trusted():
        for stage in model:
            own = {
                n: states[entry.unique_key] for n, entry in _described(stage) if entry.unique_key in states
            }
            if own:
                stage.load_state_dict(own, strict=False)


def _described(stage: Module) -> Iterator[tuple[str, ShardedObject]]:
    """Under the names that the stage's `load_state_dict` knows."""
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
