"""Saves a model as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.utils.rank import is_rank_zero


def save_model(run: RunContext, model: Model, folder: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes a Hugging Face folder from rank zero; every rank calls it, since each holds part of the weights.

    Args:
        extra: further text files, by name.

    Raises:
        UserError: it cannot be written; on every rank.
    """
    tensors = hf_tensors(model)
    problem: UserError | None = None
    if is_rank_zero():
        try:
            save_hf_folder(folder, run.shape, tensors, run.tokenizer, extra, run.base)
        except UserError as error:
            problem = error
        except (OSError, SafetensorError) as error:
            problem = UserError(
                f"{folder} could not be written ({error}); fix that and run the command again: it resumes "
                "from the last checkpoint"
            )
    for _ in tensors:  # every rank iterates, since each tensor is gathered when it is read
        continue
    problem = run_on_rank_zero(lambda: problem)
    if problem is not None:
        raise problem
