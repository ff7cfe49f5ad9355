"""Finished models on disk, written by the first process for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_parallel_r1.curriculum.workbench import Workbench
from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.hf import save_hf_folder
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.train.agreement import wait_for_all


def save_model(bench: Workbench, model: Model, folder: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes a Hugging Face folder; every process calls it, since each has a part of the weights.

    Args:
        extra: further files, name and text.
    """
    tensors = hf_tensors(model)
    if process.is_first():
        save_hf_folder(folder, bench.shape, tensors, bench.tokenizer, extra)
    else:
        for _ in tensors:  # each is gathered as it is asked for
            continue
    wait_for_all()
