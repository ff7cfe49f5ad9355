"""The loop around a stage's steps: resumes, logs, saves checkpoints, stops."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from time import monotonic
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NoReturn, Protocol

from megatron_parallel_r1.config.early_stopping import FALLING
from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.distributed.collectives import (
    all_gather_objects,
    any_rank_true,
    largest_each,
    run_on_rank_zero,
)
from megatron_parallel_r1.distributed.stragglers import StragglerWatch
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.report.progress import StageProgress
from megatron_parallel_r1.rollout.engine import Engine
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.folder import EVALUATIONS, steps_done
from megatron_parallel_r1.run.guard import Guard
from megatron_parallel_r1.run.lock import check_lock, stage_lock
from megatron_parallel_r1.run.stage_log import StageLog
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.trainer import LrSchedule, Trainer
from megatron_parallel_r1.utils.exit import stop_signal_pending
from megatron_parallel_r1.utils.interrupts import interrupts_recorded
from megatron_parallel_r1.utils.jsonl import read_jsonl
from megatron_parallel_r1.utils.rank import is_rank_zero, rank, world_size


class Stateful(Protocol):
    """State that a checkpoint saves along with the trainer."""

    def state(self) -> Any:
        """The state, JSON-ready."""
        ...

    def state_after(self, step: int) -> Any:
        """The state after a finished step, when a later one has failed."""
        ...


class Restorable(Protocol):
    """Resumes from a saved state."""

    def restore(self, state: Any) -> None: ...


# Opens an engine that holds the weights after a step.
EngineAt = Callable[[int], AbstractContextManager[Engine[Any]]]


class Evaluator(Protocol):
    """Evaluates a stage while it trains (`evaluation/stage_evaluator.py`)."""

    def measure(
        self, step: int, name: str, mode: str, engine: Engine[Any], progress: StageProgress
    ) -> dict[str, Any]:
        """Returns the record of a set in a mode; every rank calls it and gets it."""
        ...

    def forget_all_but(self, step: int | None) -> None:
        """Deletes what unfinished evaluations of other steps have left."""
        ...


class StageLoop:
    """Restores the trainer from the last checkpoint and continues after it.

        with StageLoop(run, stage, trainer, watchdog, evaluator) as loop:
            loop.restore("stream", stream)
            for step, lr in loop.steps({"stream": stream}, engine_at):
                ...
                loop.end(step, metrics)

    Where the stage has `evaluate_during`, `steps` evaluates before the first step and after those that are
    due. Their checkpoint is saved first: a run that is stopped or killed meanwhile resumes in the evaluation.

    Attributes:
        done: last finished step, 0 if the stage begins.
        guard: skips steps whose loss or gradient is not finite.
    """

    def __init__(
        self,
        run: RunContext,
        stage: SftStage | RlStage,
        trainer: Trainer,
        watchdog: Watchdog,
        evaluator: Evaluator,
    ) -> None:
        self._stage, self._trainer, self._watchdog, self._evaluator = stage, trainer, watchdog, evaluator
        self._run_folder, self._colocated = run.folder, run.recipe.rollout.colocated
        self._schedule = LrSchedule(
            stage.optimizer.lr, stage.optimizer.warmup_steps, stage.optimizer.final_lr_fraction
        )
        folder = run.stage_folder(stage.name)
        self._keeps_last = run.recipe.keeps_checkpoints(stage)
        self._metric = stage.best_metric
        better: Literal["min", "max"] = "min" if self._metric.rpartition("/")[2] in FALLING else "max"
        self._checkpoints = Checkpoints(
            checkpoint_folder(folder), stage.keep_last, better if stage.keep_best else None
        )
        self.done, self._restored = self._checkpoints.restore(trainer)
        if not self.done and stage.carry_optimizer:
            self._carry_over(run, run.recipe.start_of(stage) or "")
        self._stateful: Mapping[str, Stateful] = {}
        self._evaluations: list[dict[str, Any]] = []
        self._watched: list[float] = [] if self._watches_evaluations else self._restored.get("watched", [])
        self._since_save: list[float] = self._restored.get("since_save", [])
        self._saved = self._finished = self.done
        self._saved_at = monotonic()
        self._updates = 0
        self.guard = Guard(stage, folder, self.done)
        self.restore("guard", self.guard)
        self._log = StageLog(run.recipe, stage, folder, self.done, run.exporter, run.resumes)
        evaluator.forget_all_but(self.done if run.resumes else None)
        for record in run_on_rank_zero(partial(read_jsonl, folder / EVALUATIONS, missing_ok=True)):
            self._take_in(record)
        self._stragglers = StragglerWatch(all_gather_objects(platform.node()))
        self._slowest: dict[str, Any] = {}
        self._ended = self.done >= stage.steps or self._may_end()
        self._interrupts = ExitStack()

    def restored(self, name: str) -> Any:
        """The state that the last checkpoint saved under `name`; None without a checkpoint."""
        return self._restored.get(name)

    def restore(self, name: str, part: Restorable) -> None:
        """Restores a part from the last checkpoint, if there is one."""
        if name in self._restored:
            part.restore(self._restored[name])

    def steps(self, stateful: Mapping[str, Stateful], engine_at: EngineAt) -> Iterator[tuple[int, float]]:
        """Yields each remaining step and its learning rate; evaluates before and after them.

        Args:
            stateful: parts whose state each checkpoint saves, read in this order.
            engine_at: for evaluations.

        Raises:
            Stopped: a rank received a stop signal. The last step is saved, unless it was skipped.
        """
        self._stateful = stateful
        self._evaluate(self.done, engine_at)
        for step in range(self.done + 1, self._stage.steps + 1):
            if self._ended:
                return
            # The clock of one rank decides for all: they must save the same steps.
            is_late = (
                is_rank_zero() and 0 < self._stage.save_every_minutes * 60 <= monotonic() - self._saved_at
            )
            stops, saves = self._meet((stop_signal_pending(), is_late))
            if stops:
                self._stop_after(step - 1)
            if saves:
                self._save_extra(step - 1)
            self._watchdog.set_location(f"stage {self._stage.name}, step {step}")
            yield step, self._schedule.at(step, self._stage.steps)
            self._evaluate(step, engine_at)

    def end(
        self,
        step: int,
        metrics: dict[str, Any],
        traces: Sequence[dict[str, Any]] = (),
        histograms: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> None:
        """Logs a step, saves a checkpoint if one is due, and decides whether the stage ends here.

        Arguments as of `StageLog.step`.
        """
        stage = self._stage
        metrics = metrics | {"skipped": int(self.guard.bad_in_a_row > 0)} | self._slowest
        self._check_lock()
        self._log.step(step, metrics, traces, histograms)
        if not self.guard.bad_in_a_row:
            self._finished, self._updates = step, self._trainer.optimizer_steps
        self.guard.watch(step, metrics)
        if stage.early_stopping and metrics.get(stage.early_stopping.metric) is not None:
            self._watched.append(metrics[stage.early_stopping.metric])
        if metrics.get(self._metric) is not None:
            self._since_save.append(metrics[self._metric])
        self._ended = step == stage.steps or self._may_end()
        self._checkpoints.poll()
        if self.guard.bad_in_a_row and self._ended:
            raise UserError(
                f"stage {stage.name}, step {step}: its last step was skipped, its weights may be unusable; "
                "lower its optimizer.lr and resume from its last checkpoint with --adapt"
            )
        is_due = self._keeps_last if self._ended else step % stage.save_every == 0
        is_due = is_due or self._is_evaluated(step)
        # While steps are being skipped, the weights themselves may be the cause: save none of them.
        if is_due and not self.guard.bad_in_a_row:
            self._save(step)

    def _is_evaluated(self, step: int) -> bool:
        settings = self._stage.evaluate_during
        return settings is not None and settings.is_due(step, self._ended) and not self.guard.bad_in_a_row

    def _evaluate(self, step: int, engine_at: EngineAt) -> None:
        """Evaluates the weights after `step`, if that is due, on the sets that have no record yet.

        Raises:
            Stopped: a rank received a stop signal. The step is saved, and so are the records so far.
        """
        if not self._is_evaluated(step):
            return
        measured = {(each["set"], each["mode"]) for each in self._evaluations if each["step"] == step}
        wanted = ((name, mode) for name, each in self._stage.evaluation_sets.items() for mode in each.modes)
        if missing := [pair for pair in wanted if pair not in measured]:
            self._watchdog.set_location(f"stage {self._stage.name}, evaluation after step {step}")
            self._checkpoints.settle()
            if self._colocated:
                self._trainer.memory.offload()
            stops = False
            with engine_at(step) as engine:
                for name, mode in missing:
                    self._take_in(self._evaluator.measure(step, name, mode, engine, self._log.progress))
                    self._log.evaluation(self._evaluations[-1])
                    (stops,) = any_rank_true([stop_signal_pending()], self._trainer.device)
                    if stops:
                        break
            if self._colocated:
                self._trainer.memory.onload()
            if stops:
                self._stop_after(step)
            self._checkpoints.prune()
        self._evaluator.forget_all_but(None)
        self._ended = self._ended or self._may_end()

    def _take_in(self, record: dict[str, Any]) -> None:
        """Takes in an evaluation's record, of this start or of an earlier one."""
        self._evaluations.append(record)
        prefix = f"evaluation/{record['set']}/{record['mode']}/"
        rule = self._stage.early_stopping
        if rule is not None and rule.metric.startswith(prefix):
            self._watched.append(record[rule.metric.removeprefix(prefix)])
        if self._metric.startswith(prefix):
            self._checkpoints.rate(record["step"], record[self._metric.removeprefix(prefix)])

    def _meet(self, flags: Sequence[bool]) -> list[bool]:
        """Reduces `flags` with a logical OR over all ranks, and compares the ranks' last steps on the way."""
        seconds_W = [0.0] * world_size()
        seconds_W[rank()] = self._trainer.passes.take()
        largest = largest_each([*(float(flag) for flag in flags), *seconds_W], self._trainer.device)
        if world_size() > 1:
            self._slowest = self._stragglers.metrics(largest[len(flags) :])
            if is_rank_zero() and (warning := self._stragglers.warning(self._slowest)):
                print(f"warning: stage {self._stage.name}, {warning}", file=sys.stderr)
        return [bool(flag) for flag in largest[: len(flags)]]

    def _carry_over(self, run: RunContext, before: str) -> None:
        """Loads weights and optimizer state from the end of the previous stage."""
        stage = next(other for other in run.recipe.trained_stages if other.name == before)
        start = run.start_folder(before)
        folder = checkpoint_folder(start)
        end = steps_done(start.parent, stage)
        if Checkpoints(folder).restore(self._trainer)[0] != end:
            raise UserError(
                f"stage {self._stage.name}: carry_optimizer, but {folder} has no intact checkpoint of step "
                f"{end}; run {before} again, or start with a fresh optimizer"
            )

    def _may_end(self) -> bool:
        rule = self._stage.early_stopping
        if rule is None:
            return False
        steps = self._finished if self._watches_evaluations else len(self._watched)
        return rule.reached(self._watched, steps)

    @property
    def _watches_evaluations(self) -> bool:
        rule = self._stage.early_stopping
        return rule is not None and rule.metric.startswith("evaluation/")

    def _stop_after(self, step: int) -> NoReturn:
        """Stops the stage after saving the step, unless it was skipped or is saved already."""
        self._save_extra(step)
        self._checkpoints.settle()
        saved = "saved" if self._saved == step else f"the last checkpoint is of step {self._saved}"
        raise Stopped(f"stage {self._stage.name}: stopped by a signal after step {step}, {saved}")

    def _save_extra(self, step: int) -> None:
        """Saves a step that `save_every` does not ask for, unless it was skipped or is saved already.

        Such a checkpoint has no score, so it cannot be the best.
        """
        if step > self._saved and not self.guard.bad_in_a_row:
            self._save(step, is_due=False)

    def _save_finished(self, error: Exception) -> None:
        """Saves the last finished step when a later one has failed before it changed the weights.

        Saving is a collective: if only some ranks have failed, it saves nothing.
        """
        step, on_all_ranks = self._finished, isinstance(error, UserError) and error.on_all_ranks
        if step <= self._saved or self.guard.bad_in_a_row or not (world_size() == 1 or on_all_ranks):
            return
        if self._trainer.optimizer_steps != self._updates:
            return
        with suppress(Exception):  # `error` says what was wrong first
            self._trainer.memory.onload()
            self._save(step, is_due=False, failed=True)
            self._checkpoints.settle()
            saved = f"the stage's steps through {step} are saved"
            if isinstance(error, UserError):
                error.args = (f"{error}; {saved}",)
            else:
                print(f"stage {self._stage.name}: {saved}", file=sys.stderr)

    def _check_lock(self) -> None:
        if is_rank_zero():
            check_lock(self._run_folder, stage_lock(self._stage.name))

    def _save(self, step: int, is_due: bool = True, failed: bool = False) -> None:
        self._check_lock()
        state = {
            name: part.state_after(step) if failed else part.state() for name, part in self._stateful.items()
        }
        score = fmean(self._since_save) if self._since_save and is_due else None
        if is_due:
            self._since_save = []
        state |= {"watched": self._watched, "guard": self.guard.state(), "since_save": self._since_save}
        self._checkpoints.save(self._trainer, step, state, score)
        self._saved, self._saved_at = step, monotonic()

    def __enter__(self) -> StageLoop:
        self._log.__enter__()
        self._interrupts.enter_context(interrupts_recorded())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._interrupts:
            self._log.__exit__(kind, error, trace)
            if error is None:
                self._checkpoints.settle()
            elif isinstance(error, Exception) and not isinstance(error, Stopped):
                self._save_finished(error)


def checkpoint_folder(stage_folder: Path) -> Path:
    return stage_folder / "checkpoints"
