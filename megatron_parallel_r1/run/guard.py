"""Guards a stage's steps: skips those that are not finite, saves their batch, warns of collapse."""

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

# Steps of a mean when looking for a collapse.
WINDOW = 10
# Entropy in nats below which a policy hardly explores.
LEAST_ENTROPY = 0.01
# The metrics of a step whose updates were skipped.
SKIPPED: dict[str, Any] = {"loss": None, "grad_norm": None}


class Batch(Protocol):
    """The data of a step."""

    def records(self) -> Sequence[Mapping[str, Any]]:
        """The batch, JSON-ready, for inspection."""
        ...


class Guard:
    """Watches the steps of one stage.

    Args:
        folder: the stage's folder; skipped batches go to `bad_steps.jsonl` in it.
        done: last finished step; batches of later steps are dropped from that file.

    Attributes:
        bad_in_a_row: steps skipped since the last finite one; no checkpoint is saved meanwhile.
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
        """The state for `restore`, JSON-ready."""
        return {"seen": self._seen, "warned": sorted(self._warned)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state that `state` returned."""
        self._seen = {name: list(values) for name, values in state["seen"].items()}
        self._warned = set(state["warned"])

    @contextmanager
    def skip_if_not_finite(self, step: int, batch: Batch) -> Iterator[None]:
        """Suppresses `NotFinite` from the block; updates that the step made before it stay in effect.

        Raises:
            UserError: too many consecutive steps were not finite.
        """
        try:
            yield
        except NotFinite as error:
            self._skip(step, error, batch)
        else:
            self.bad_in_a_row = 0

    def watch(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Warns once each if the reward or the entropy collapses."""
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
        records = list(batch.records())
        if is_rank_zero():
            with JsonlWriter(self._path) as lines:
                lines.write({"step": step, "error": str(error), "batch": records})
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
    """Returns whether the mean of the last WINDOW values lost more than half of the best gain over the first
    such mean, or fell below the first.

    Differences below a tenth of the values' scale are noise and do not count.
    """
    if len(values) < 3 * WINDOW:
        return False
    means = [fmean(values[start : start + WINDOW]) for start in range(0, len(values) - WINDOW + 1)]
    first, best, last = means[0], max(means), means[-1]
    clear = 0.1 * max(1.0, abs(first))
    return last < first - clear or (best - first > clear and last < (first + best) / 2)
