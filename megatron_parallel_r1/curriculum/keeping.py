"""Models on disk, written by the first process for all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_parallel_r1 import config
from megatron_parallel_r1.curriculum.workbench import Workbench
from megatron_parallel_r1.model import process
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.hf import save_hf_folder
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.train.agreement import wait_for_all
from megatron_parallel_r1.train.learning import Learner


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


def renew_reference(bench: Workbench, stage: config.RlStage, learner: Learner, step: int) -> None:
    """Gives a KL term's reference the trained weights if it is time, and keeps them for a run that goes on.

    Those that no checkpoint can ask for any more are deleted.
    """
    reference = learner.reference
    if reference is None or not step or reference.born(step) != step:
        return
    reference.renew(learner.trainer.model)
    save_model(bench, reference.model, bench.reference_folder(stage, step))
    saved = [int(path.name[5:]) for path in bench.stage_folder(stage.name).glob("checkpoints/step_*")]
    oldest = reference.born(min(saved, default=0))
    if process.is_first():
        for folder in bench.reference_folder(stage, step).parent.iterdir():
            if folder < bench.reference_folder(stage, oldest):
                shutil.rmtree(folder)
