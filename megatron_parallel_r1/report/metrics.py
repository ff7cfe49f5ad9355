"""Writes the metrics of a stage to `metrics.jsonl` and TensorBoard.

The schemas of the records are in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_parallel_r1.utils.jsonl import JsonlWriter, jsonable, read_jsonl

__all__ = ["MetricsWriter", "read_jsonl"]

NOT_SCALARS = ("step", "steps")


class MetricsWriter:
    """Writes a record per step to `<folder>/metrics.jsonl` and `<folder>/tensorboard/`.

    Only one process of a job may use it.

    Args:
        folder: of the stage, `runs/<name>/<stage>`.
        resume_step: the step of the checkpoint that the run resumes from, whose later records are dropped;
            0 for a new run.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._lines = JsonlWriter(folder / "metrics.jsonl", through=resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a step's record: "step", "kind" and any numbers; NaN becomes null."""
        plain = jsonable(record)
        self._lines.write(plain)
        for name, value in plain.items():
            if name not in NOT_SCALARS and isinstance(value, bool | int | float):
                self._board.add_scalar(f"{plain['kind']}/{name}", value, plain["step"])
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
