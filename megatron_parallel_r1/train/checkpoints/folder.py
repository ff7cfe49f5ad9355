"""Checkpoints of a stage: model, optimizer and the loop's state, in Megatron's distributed format.

A checkpoint is written under another name and renamed when all of it is on disk, so a folder named `step_…`
was complete once; its manifest shows whether it still is. It loads under any parallel layout, with or without
a distributed optimizer.

No random state is saved: every draw, and the learning rate, is a function of the recipe's seed and the step.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_parallel_r1.distributed.collectives import all_gather_objects, all_ranks_true, run_on_rank_zero
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.checkpoints.manifest import Damaged, Manifest, file_fault, read_manifest
from megatron_parallel_r1.train.checkpoints.sharded import EXTRA as EXTRA
from megatron_parallel_r1.train.checkpoints.sharded import (
    cast_matrices,
    extra_states,
    live_parts,
    set_extra_states,
    set_optimizer_steps,
)
from megatron_parallel_r1.train.checkpoints.writer import CheckpointWriter, WriteFailed
from megatron_parallel_r1.train.trainer import Trainer
from megatron_parallel_r1.utils.files import fsync_path

# Prefixes of folders being written or deleted; the leftovers of a killed run are deleted.
WRITING, DELETING = ".writing_", ".deleting_"


@dataclass(frozen=True, slots=True)
class _Underway:
    writing: CheckpointWriter
    work: Path
    final: Path
    device: torch.device


class Checkpoints:
    """The checkpoints in one folder, which all ranks see. Every method is a collective over all ranks.

    Args:
        folder: created with the first checkpoint.
        keep_best: also keep the one with the lowest or highest score, the later of equals; None: do not.
    """

    def __init__(
        self, folder: Path, keep_last: int = 2, keep_best: Literal["min", "max"] | None = None
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; keep at least 1, from which the run resumes")
        self._folder = folder
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._underway: _Underway | None = None
        self._rated: dict[int, float] = {}

    def save(self, trainer: Trainer, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Starts saving the current weights, optimizer and `state` (JSON), after `step`.

        The checkpoint exists once a later `poll` or `settle` completes it; an earlier one is settled first.

        Raises:
            UserError: see `settle`.
        """
        self.settle()
        parts = live_parts(trainer)
        about = Manifest(step, trainer.optimizer_steps, score, json.loads(json.dumps(state)), files={})
        final = self._folder / f"step_{step:06d}"
        try:
            work = run_on_rank_zero(self._new_work_folder)
        except OSError as error:
            raise UserError(
                f"checkpoint {final} cannot be written: {error.strerror}; make room, or choose another out"
            ) from None
        self._underway = _Underway(
            CheckpointWriter(work, parts, extra_states(trainer.model), about), work, final, trainer.device
        )

    def rate(self, step: int, score: float) -> None:
        """Sets the score of a step's checkpoint, which `save` had none for; it is not kept on disk."""
        self._rated[step] = score

    def prune(self) -> None:
        """Deletes the checkpoints that are no longer to be kept, as every new one does."""
        run_on_rank_zero(self._delete_old)

    def poll(self) -> None:
        """Completes the pending checkpoint if all ranks have written it; does nothing without one.

        Raises:
            UserError: see `settle`.
        """
        if self._underway and all_ranks_true(self._underway.writing.is_written, self._underway.device):
            self.settle()

    def settle(self) -> None:
        """Waits for the pending checkpoint and completes it.

        Raises:
            UserError: it could not be written. Its files are deleted; earlier checkpoints are untouched.
        """
        if self._underway is None:
            return
        underway, self._underway = self._underway, None
        try:
            underway.writing.complete()
            run_on_rank_zero(lambda: self._instate(underway.work, underway.final))
        except (WriteFailed, OSError) as error:
            run_on_rank_zero(lambda: shutil.rmtree(underway.work, ignore_errors=True))
            raise UserError(
                f"checkpoint {underway.final} could not be written: {error}; fix that and run the command "
                "again: it resumes from the previous checkpoint"
            ) from None

    def restore(self, trainer: Trainer) -> tuple[int, dict[str, Any]]:
        """Restores the trainer from the last intact checkpoint; returns its step and state, or 0 and {}.

        Damaged ones after it are reported on standard error and renamed to `damaged_…`.

        Raises:
            UserError: all are damaged, or the last intact one is of another model.
        """
        self.settle()
        found = run_on_rank_zero(self._open)
        rejected: list[tuple[Path, str]] = []
        for folder in reversed(found):
            manifest, faults = self._verified(folder)
            if faults:
                rejected.append((folder, faults[0] + (f", and {len(faults) - 1} more" if faults[1:] else "")))
                continue
            _load(trainer, folder, manifest)
            run_on_rank_zero(partial(self._set_aside, rejected, manifest.step))
            return manifest.step, manifest.state
        if rejected:
            reasons = "; ".join(f"{folder.name}: {why}" for folder, why in rejected)
            raise UserError(
                f"{self._folder}: no checkpoint is intact ({reasons}); replace one by an undamaged copy, or "
                "delete the folder to start the stage over"
            )
        return 0, {}

    def _verified(self, folder: Path) -> tuple[Manifest, list[str]]:
        """Reads a checkpoint's manifest and checks its files, split over ranks; returns it and the faults."""
        try:
            manifest = run_on_rank_zero(lambda: read_manifest(folder))
        except Damaged as damage:
            return Manifest(0, 0, None, {}, {}), [str(damage)]
        share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        found = (file_fault(folder / name, manifest.files[name]) for name in share)
        return manifest, sorted(
            why for some in all_gather_objects([why for why in found if why]) for why in some
        )

    # The rest runs on rank zero alone.

    def _open(self) -> list[Path]:
        """Deletes the leftovers of a killed run; returns all checkpoints, oldest first."""
        for left in (*self._folder.glob(f"{WRITING}*"), *self._folder.glob(f"{DELETING}*")):
            shutil.rmtree(left, ignore_errors=True)
        return self._complete()

    def _complete(self) -> list[Path]:
        numbered = {re.fullmatch(r"step_(\d+)", path.name): path for path in self._folder.glob("step_*")}
        return [path for _, path in sorted((int(name[1]), path) for name, path in numbered.items() if name)]

    def _new_work_folder(self) -> Path:
        work = self._folder / f"{WRITING}{secrets.token_hex(8)}"
        work.mkdir(parents=True)
        return work

    def _instate(self, work: Path, final: Path) -> None:
        """Renames a complete checkpoint to its final name, and deletes those no longer to keep."""
        if final.exists():
            self._delete(final)
        work.rename(final)
        fsync_path(self._folder)
        self._delete_old()

    def _delete_old(self) -> None:
        complete = self._complete()
        keep = {*complete[-self._keep_last :], *self._best(complete)}
        for old in complete:
            if old not in keep:
                self._delete(old)

    def _best(self, complete: list[Path]) -> list[Path]:
        if self._keep_best is None:
            return []
        sign = 1 if self._keep_best == "max" else -1
        scored = [
            (sign * score, place)
            for place, path in enumerate(complete)
            if (score := self._score(path)) is not None
        ]
        return [complete[max(scored)[1]]] if scored else []

    def _score(self, folder: Path) -> float | None:
        try:
            manifest = read_manifest(folder)
        except Damaged:
            return None
        score = self._rated.get(manifest.step, manifest.score)
        return score if score is not None and math.isfinite(score) else None

    def _delete(self, folder: Path) -> None:
        """Renames before it deletes, so that a run killed here leaves no partial checkpoint."""
        doomed = folder.rename(self._folder / f"{DELETING}{secrets.token_hex(8)}")
        shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, rejected: list[tuple[Path, str]], step: int) -> None:
        for folder, why in rejected:
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            print(
                f"checkpoint {folder.name} is damaged: {why}; resuming from step {step}, it is now {aside}",
                file=sys.stderr,
            )


def _load(trainer: Trainer, folder: Path, manifest: Manifest) -> None:
    """Loads a verified checkpoint directly into the trainer's memory.

    Raises:
        UserError: its tensors are not those of the trainer.
    """
    parts = live_parts(trainer)
    own = {part.key: tuple(part.global_shape) for part in parts}
    wanted = {key: shape for some in all_gather_objects(own) for key, shape in some.items()}
    held = {
        key: tuple(tensor.global_shape)
        for key, tensor in dist_checkpointing.serialization.load_tensors_metadata(str(folder)).items()
    }
    problems = [f"{key} is not in it" for key in wanted.keys() - held]
    problems += [f"{key} is not in the model" for key in held.keys() - wanted]
    problems += [
        f"{key} is {held[key]} instead of {wanted[key]}"
        for key in wanted.keys() & held
        if held[key] != wanted[key]
    ]
    if problems:
        raise UserError(
            f"checkpoint {folder} is of another model: {min(problems)}"
            + (f", and {len(problems) - 1} more" if problems[1:] else "")
            + "; resume with the recipe that made it, or start over in another folder"
        )
    dist_checkpointing.load({str(number): part for number, part in enumerate(parts)}, str(folder))
    if EXTRA in manifest.files:  # whose digest was therefore checked
        set_extra_states(trainer.model, load_file(folder / EXTRA))
    cast_matrices(trainer)
    set_optimizer_steps(trainer, manifest.optimizer_steps)
