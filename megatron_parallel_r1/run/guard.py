"""What a stage does about steps that go wrong: leaves them out, keeps them, warns, gives up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.train.trainer import NotFinite
from megatron_parallel_r1.utils.jsonl import JsonlWriter
from megatron_parallel_r1.utils.rank import is_rank_zero

WINDOW = 10  # steps that a collapse is told from
# Entropy in nats below which a policy has next to nothing left to explore.
LEAST_ENTROPY = 0.01


class Guard:
    """Watches over the steps of one stage.

    Args:
        folder: of the stage; `bad_steps.jsonl` in it gets what was left out.
        done: steps that the stage has behind it.

    Attributes:
        in_a_row: bad steps since the last good one; nothing is saved between them.
    """

    def __init__(self, stage: SftStage | RlStage, folder: Path, done: int) -> None:
        self._stage = stage
        self._path = folder / "bad_steps.jsonl"
        self.in_a_row = 0
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

    def learn(
        self, step: int, learn: Callable[[], dict[str, Any]], batch: Callable[[], Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """What `learn` returned, or that the step was left out.

        Args:
            learn: makes the updates of the step; raises NotFinite before one that would spoil the weights.
                Those before it stay made.
            batch: what the step trained on, JSON-ready, to be looked at later.

        Raises:
            UserError: too many steps in a row went wrong.
        """
        try:
            learned = learn()
        except NotFinite as error:
            self._leave_out(step, error, batch())
            return {"loss": None, "grad_norm": None, "skipped": 1}
        self.in_a_row = 0
        return learned | {"skipped": 0}

    def look_at(self, step: int, measured: Mapping[str, Any]) -> None:
        """Warns once where reward or entropy collapses."""
        for name, seen in self._seen.items():
            if measured.get(name) is not None:
                seen.append(measured[name])
        if has_fallen(self._seen["reward"]):
            self._warn(
                "reward",
                f"step {step}: the reward has lost more than half of what it had gained; stop, "
                "lower optimizer.lr and go on with --adapt",
            )
        entropies = self._seen["entropy"][-WINDOW:]
        if entropies and fmean(entropies) < LEAST_ENTROPY:
            self._warn(
                "entropy",
                f"step {step}: the entropy is below {LEAST_ENTROPY} nats, hardly anything is explored; "
                "stop, raise objective.clip_high or give an entropy bonus, and go on with --adapt",
            )

    def _leave_out(self, step: int, error: NotFinite, batch: Sequence[Mapping[str, Any]]) -> None:
        self.in_a_row += 1
        most = self._stage.max_bad_steps
        if is_rank_zero():
            with JsonlWriter(self._path) as lines:
                lines.write({"step": step, "error": str(error), "batch": list(batch)})
        if self.in_a_row >= most:
            raise UserError(
                f"stage {self._stage.name}, step {step}: {error}, {most} times in a row; the batches are in "
                f"{self._path}. Lower the stage's optimizer.lr; --adapt goes on from its last checkpoint"
            ) from None
        self._say(f"step {step}: {error}; the step is left out, its batch kept in {self._path}")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._say(message)

    def _say(self, message: str) -> None:
        if is_rank_zero():
            print(f"warning: stage {self._stage.name}, {message}", file=sys.stderr)


def has_fallen(values: Sequence[float]) -> bool:
    """Whether the mean of the last WINDOW values lies nearer to the first such mean than to the best, or
    below the first.

    Clearly: by a tenth of what values are worth, or noise would be a gain or a fall.
    """
    if len(values) < 3 * WINDOW:
        return False
    means = [fmean(values[start : start + WINDOW]) for start in range(0, len(values) - WINDOW + 1)]
    first, best, last = means[0], max(means), means[-1]
    clear = 0.1 * max(1.0, abs(first))
    return last < first - clear or (best - first > clear and last < (first + best) / 2)
