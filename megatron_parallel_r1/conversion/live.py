"""A checkpoint into a live model by Megatron's own loader, which shares no line with our reading."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_parallel_r1.checkpoint_formats.torch_dist import find_checkpoint
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model


@torch.no_grad()
def load_with_megatron(model: Model, path: Path) -> None:
    """Sets this process's weights from a distributed checkpoint; all processes call it.

    Raises:
        UserError: there is none.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: no distributed checkpoint of Megatron; give its folder")
    metadata = dist_checkpointing.load_content_metadata(str(folder)) or {"non_homogeneous_layers": True}
    for stage in model:
        wanted = stage.sharded_state_dict(metadata=metadata)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about what Megatron calls
            held, missing, _more = dist_checkpointing.load(
                wanted, str(folder), strict=StrictHandling.RETURN_ALL
            )
        # Scales of FP8, which weights from elsewhere do not have.
        strange = sorted(key for key in missing if "_extra_state" not in key)
        if strange:
            raise UserError(f"{folder}: {strange[0]} is missing; give a checkpoint of this model")
        stage.load_state_dict(held, strict=False)
