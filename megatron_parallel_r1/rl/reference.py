"""The reference policy of the KL term: frozen, or updated from the trained policy every few steps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch

from megatron_parallel_r1.config.stages import RlStage
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.save import save_model
from megatron_parallel_r1.train.logprob_runner import LogprobRunner
from megatron_parallel_r1.train.micro_batch import MicroBatch
from megatron_parallel_r1.utils.rank import is_rank_zero


class Reference:
    """A second model with the architecture and parallel layout of the trained one.

    Args:
        model: holds the reference weights.
        temperature: the trainer's.
        every: steps between copies of the trained weights; 0: never.
    """

    def __init__(self, model: Model, temperature: float, every: int = 0) -> None:
        self.model = model.requires_grad_(False)
        self._runner = LogprobRunner(model, temperature)
        self._every = every

    def score(self, batches: Sequence[MicroBatch]) -> None:
        """Adds its log-probs to each micro-batch as `reference`, on the last pipeline stage."""
        for batch, logprobs_N in zip(batches, self._runner.logprobs(batches), strict=False):
            batch.values["reference"] = logprobs_N

    def version(self, step: int) -> int:
        """The step whose weights it holds after `step`; 0: the stage's starting weights."""
        return version_at(step, self._every)

    @torch.no_grad()
    def copy_from(self, trained: Model) -> None:
        """Copies the trained weights."""
        for own, new in zip(self.model.parameters(), trained.parameters(), strict=True):
            own.copy_(new)


def version_at(step: int, every: int) -> int:
    """The last multiple of `every` up to `step`; 0 if `every` is 0."""
    return step - step % every if every else 0


def make_reference(run: RunContext, stage: RlStage, done: int) -> Reference:
    """Builds the reference that the stage had after step `done`."""
    version = version_at(done, stage.reference_every)
    folder = run.reference_folder(stage, version) if version else None
    temperature = run.recipe.thinking_of(stage).temperature or 1.0
    return Reference(run.model(stage, folder), temperature, stage.reference_every)


def update_reference(
    run: RunContext, stage: RlStage, reference: Reference | None, trained: Model, step: int
) -> None:
    """Copies the trained weights into the reference when due, and saves them for a run that resumes.

    Deletes saved weights that no checkpoint needs any more.
    """
    if reference is None or not step or reference.version(step) != step:
        return
    reference.copy_from(trained)
    save_model(run, reference.model, run.reference_folder(stage, step))
    saved = [int(path.name[5:]) for path in run.stage_folder(stage.name).glob("checkpoints/step_*")]
    oldest = reference.version(min(saved, default=0))
    if is_rank_zero():
        for folder in run.reference_folder(stage, step).parent.iterdir():
            if folder < run.reference_folder(stage, oldest):
                shutil.rmtree(folder)
