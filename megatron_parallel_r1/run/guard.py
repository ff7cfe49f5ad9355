"""Guards a stage's steps: skips those that are not finite, keeps their batch, warns of collapse, gives up."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.trainer import NotFinite
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero

# Steps whose mean a collapse is measured by.
WINDOW = 10
# Entropy in nats below which a policy has next to nothing left to explore.
LEAST_ENTROPY = 0.01
# The metrics of a step whose updates were skipped.
SKIPPED: dict[str, Any] = {"loss": None, "grad_norm": None}


class Batch(Protocol):
    """What a step trains on."""

    def records(self) -> Sequence[Mapping[str, Any]]:
        """The batch JSON-ready, to look at later."""
        ...


class Guard:
    """Watches the steps of one stage.

    Args:
        folder: of the stage; skipped batches go to `bad_steps.jsonl` in it.
        done: steps that the stage has behind it.

    Attributes:
        bad_in_a_row: skipped steps since the last good one; nothing is saved between them.
    """

    def __init__(self, stage: SftStage | RlStage, folder: Path, done: int) -> None:
        self._stage = stage
        self._path = folder / "bad_steps.jsonl"
        self.bad_in_a_row = 0
        self._seen: dict[str, list[float]] = {"reward": [], "entropy": []}
        self._warned: set[str] = set()
        if is_rank_zero() and self._path.exists():
            JsonlWriter(self._path, through=done).close()

    def state(self) -> dict[str, Any]:
        """What `restore` needs, JSON-ready."""
        return {"seen": self._seen, "warned": sorted(self._warned)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on as a guard would after `state`."""
        self._seen = {name: list(values) for name, values in state["seen"].items()}
        self._warned = set(state["warned"])

    @contextmanager
    def skip_if_not_finite(self, step: int, batch: Batch) -> Iterator[None]:
        """Leaves the block at an update that would spoil the weights; updates before it stay made.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        try:
            yield
        except NotFinite as error:
            self._skip(step, error, batch)
        else:
            self.bad_in_a_row = 0

    def watch(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Warns once if reward or entropy collapses."""
        for name, seen in self._seen.items():
            if metrics.get(name) is not None:
                seen.append(metrics[name])
        if has_collapsed(self._seen["reward"]):
            self._warn_once(
                "reward",
                f"step {step}: the reward has lost more than half of its gain; stop, "
                "lower optimizer.lr and resume with --adapt",
            )
        entropies = self._seen["entropy"][-WINDOW:]
        if entropies and fmean(entropies) < LEAST_ENTROPY:
            self._warn_once(
                "entropy",
                f"step {step}: the entropy is below {LEAST_ENTROPY} nats, the policy hardly explores; "
                "stop, raise objective.clip_high or add an entropy bonus, and resume with --adapt",
            )

    def _skip(self, step: int, error: NotFinite, batch: Batch) -> None:
        self.bad_in_a_row += 1
        most = self._stage.max_bad_steps
        if is_rank_zero():
            with JsonlWriter(self._path) as lines:
                lines.write({"step": step, "error": str(error), "batch": list(batch.records())})
        if self.bad_in_a_row >= most:
            raise UserError(
                f"stage {self._stage.name}, step {step}: {error}, {most} times in a row; the batches are in "
                f"{self._path}. Lower the stage's optimizer.lr; --adapt resumes from its last checkpoint"
            ) from None
        self._warn(f"step {step}: {error}; the step is skipped, its batch is in {self._path}")

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            self._warn(message)

    def _warn(self, message: str) -> None:
        if is_rank_zero():
            print(f"warning: stage {self._stage.name}, {message}", file=sys.stderr)


def has_collapsed(values: Sequence[float]) -> bool:
    """Whether the mean of the last WINDOW values is nearer to the first such mean than to the best, or below
    the first.

    Only differences of a tenth of the values' scale count, or noise would be a gain or a fall.
    """
    if len(values) < 3 * WINDOW:
        return False
    means = [fmean(values[start : start + WINDOW]) for start in range(0, len(values) - WINDOW + 1)]
    first, best, last = means[0], max(means), means[-1]
    clear = 0.1 * max(1.0, abs(first))
    return last < first - clear or (best - first > clear and last < (first + best) / 2)
