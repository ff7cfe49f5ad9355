"""Models on disk, written by the first process for all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.distributed.collectives import run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import hf_tensors
from megatron_parallel_r1.rl.learner import Learner
from megatron_parallel_r1.run.context import Workbench
from megatron_parallel_r1.utils.rank import is_rank_zero


def save_model(bench: Workbench, model: Model, folder: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes a Hugging Face folder; every process calls it, since each has a part of the weights.

    Args:
        extra: further files, name and text.

    Raises:
        UserError: it cannot be written; on every process.
    """
    tensors = hf_tensors(model)
    problem: UserError | None = None
    if is_rank_zero():
        try:
            save_hf_folder(folder, bench.shape, tensors, bench.tokenizer, extra)
        except UserError as error:
            problem = error
        except (OSError, SafetensorError) as error:
            problem = UserError(
                f"{folder} could not be written ({error}); mend that and start again, the run goes on from "
                "its last checkpoint"
            )
    for _ in tensors:  # each is gathered as it is asked for, by all
        continue
    problem = run_on_rank_zero(lambda: problem)
    if problem is not None:
        raise problem


def renew_reference(bench: Workbench, stage: RlStage, learner: Learner, step: int) -> None:
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
    if is_rank_zero():
        for folder in bench.reference_folder(stage, step).parent.iterdir():
            if folder < bench.reference_folder(stage, oldest):
                shutil.rmtree(folder)
