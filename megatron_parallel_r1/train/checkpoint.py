"""Checkpoints of a stage: model and optimizer by Megatron's distributed checkpointing, and the loop's state.

A checkpoint is written beside its final name and renamed when it is complete, so that a folder named
`step_…` can be trusted however the run ended.
"""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_parallel_r1.train.trainer import Trainer

# How the optimizer's state is laid out in the file: any later parallel layout can read it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, trainer: Trainer, step: int, state: dict[str, Any]) -> None:
        """Keeps weights, optimizer and `state` (JSON) as of `step`."""
        final = self._folder / f"step_{step:06d}"
        work = self._folder / f".{final.name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _collect_in_process()
        dist_checkpointing.save(_sharded(trainer, loading=False), str(work))
        (work / "loop.json").write_text(json.dumps({"step": step, "state": state}))
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)

    def restore(self, trainer: Trainer) -> tuple[int, dict[str, Any]]:
        """Brings the trainer to the last checkpoint; its step and state, or 0 and {} if there is none."""
        found = self._complete()
        if not found:
            return 0, {}
        loaded = dist_checkpointing.load(_sharded(trainer, loading=True), str(found[-1]))
        trainer.model.load_state_dict(loaded["model"])
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        loop = json.loads((found[-1] / "loop.json").read_text())
        return loop["step"], loop["state"]

    def _complete(self) -> list[Path]:
        return sorted(self._folder.glob("step_*"))


def _collect_in_process() -> None:
    """Gives Megatron's writer a plain queue for its results.

    Its own one lives in a server process, for writers that outlast the call. A save that waits for its
    writers needs none, and the server would outlive a killed run.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _sharded(trainer: Trainer, loading: bool) -> dict[str, Any]:
    model = trainer.model.sharded_state_dict(metadata=METADATA)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=METADATA)
    return {"model": model, "optimizer": optimizer}
