"""The frame around a stage's steps: where it goes on, what it writes down, when it saves, when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, NoReturn

from megatron_parallel_r1.config.stages import RlStage, SftStage
from megatron_parallel_r1.data.sampler import ProblemStream
from megatron_parallel_r1.distributed.collectives import all_ranks_true
from megatron_parallel_r1.distributed.stop_signals import stop_signal_pending
from megatron_parallel_r1.distributed.watchdog import Watchdog
from megatron_parallel_r1.errors import Stopped, UserError
from megatron_parallel_r1.run.context import Workbench
from megatron_parallel_r1.run.folder import steps_done
from megatron_parallel_r1.run.guard import Guard
from megatron_parallel_r1.run.stage_log import StageLog
from megatron_parallel_r1.train.checkpoints.folder import Checkpoints
from megatron_parallel_r1.train.trainer import Schedule, Trainer

# What a checkpoint is judged by: a metric, and whether it should fall or rise.
SCORES = {"sft": ("loss", "min"), "rl": ("accuracy", "max")}


class StageLoop:
    """Goes on after the last checkpoint.

        with StageLoop(bench, stage, trainer, stream, watchdog) as loop:
            for step, lr in loop:
                ...
                loop.end(step, measured)

    Attributes:
        done: steps that the stage has behind it when it goes on.
        guard: keeps steps that go wrong from doing harm.
        in_flight: what a checkpoint holds of work that runs ahead of the steps, JSON-ready.
        found: what the last checkpoint held of it, None at a fresh begin.
    """

    def __init__(
        self,
        bench: Workbench,
        stage: SftStage | RlStage,
        trainer: Trainer,
        stream: ProblemStream[Any],
        watchdog: Watchdog,
    ) -> None:
        self._stage, self._trainer, self._stream, self._watchdog = stage, trainer, stream, watchdog
        self._schedule = Schedule(
            stage.optimizer.lr, stage.optimizer.warmup_steps, stage.optimizer.final_lr_fraction
        )
        folder = bench.stage_folder(stage.name)
        self._keeps_last = bench.recipe.keeps_checkpoints(stage)
        self._metric, direction = SCORES[stage.kind]
        self._checkpoints = Checkpoints(
            checkpoint_folder(folder), stage.keep_last, direction if stage.keep_best else None
        )
        self.done, state = self._checkpoints.restore(trainer)
        if not self.done and stage.carry_optimizer:
            self._carry_over(bench, bench.recipe.start_of(stage) or "")
        stream.restore(state.get("stream", stream.state()))
        self._watched: list[float] = state.get("watched", [])
        self._since_save: list[float] = state.get("since_save", [])
        self._saved = self.done
        self.found: Any = state.get("in_flight")
        self.in_flight: Callable[[], Any] = lambda: None
        self.guard = Guard(stage, folder, self.done)
        if "guard" in state:
            self.guard.restore(state["guard"])
        self._log = StageLog(bench.recipe, stage, folder, self.done)
        self._ended = self.done >= stage.steps or self._may_end()

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Each further step and its learning rate.

        Raises:
            Stopped: a process was sent a stop signal. What is done is saved, unless its last step was bad.
        """
        for step in range(self.done + 1, self._stage.steps + 1):
            if self._ended:
                return
            if not all_ranks_true(not stop_signal_pending(), self._trainer.device):
                self._stop_after(step - 1)
            self._watchdog.set_location(f"stage {self._stage.name}, step {step}")
            yield step, self._schedule.at(step, self._stage.steps)

    def end(self, step: int, measured: dict[str, Any], traces: Sequence[dict[str, Any]] = ()) -> None:
        """Writes a step down, saves if it is time, and sees whether the stage may end here."""
        stage = self._stage
        self._log.step(step, measured, traces)
        self.guard.look_at(step, measured)
        if stage.early_stopping and measured.get(stage.early_stopping.metric) is not None:
            self._watched.append(measured[stage.early_stopping.metric])
        if measured.get(self._metric) is not None:
            self._since_save.append(measured[self._metric])
        self._ended = step == stage.steps or self._may_end()
        self._checkpoints.poll()
        if self.guard.in_a_row and self._ended:
            raise UserError(
                f"stage {stage.name}, step {step}: its last step was left out, its weights may be spoilt; "
                "lower its optimizer.lr and go on from its last checkpoint with --adapt"
            )
        is_time = self._keeps_last if self._ended else step % stage.save_every == 0
        # Between bad steps the weights may be what makes them bad.
        if is_time and not self.guard.in_a_row:
            self._save(step)

    def _carry_over(self, bench: Workbench, before: str) -> None:
        """Takes weights and optimizer from the end of the stage before."""
        stage = next(other for other in bench.recipe.stages if other.name == before)
        folder = checkpoint_folder(bench.stage_folder(before))
        end = steps_done(bench.folder, stage)
        if Checkpoints(folder).restore(self._trainer)[0] != end:
            raise UserError(
                f"stage {self._stage.name}: carry_optimizer, but {folder} has no whole checkpoint of step "
                f"{end}; run {before} anew, or begin with a fresh optimizer"
            )

    def _may_end(self) -> bool:
        return self._stage.early_stopping is not None and self._stage.early_stopping.reached(self._watched)

    def _stop_after(self, step: int) -> NoReturn:
        """Saves the step, if it may be saved and is not yet, and says that the stage stops behind it.

        The checkpoint is beyond those that are due, so it takes no part in which is the best.
        """
        if step > self._saved and not self.guard.in_a_row:
            self._save(step, is_due=False)
        self._checkpoints.settle()
        saved = "saved" if self._saved == step else f"the last checkpoint is of step {self._saved}"
        raise Stopped(f"stage {self._stage.name}: stopped by a signal after step {step}, {saved}")

    def _save(self, step: int, is_due: bool = True) -> None:
        in_flight = self.in_flight()
        score = fmean(self._since_save) if self._since_save and is_due else None
        if is_due:
            self._since_save = []
        state = {
            "stream": self._stream.state(),
            "watched": self._watched,
            "guard": self.guard.state(),
            "in_flight": in_flight,
            "since_save": self._since_save,
        }
        self._checkpoints.save(self._trainer, step, state, score)
        self._saved = step

    def __enter__(self) -> StageLoop:
        self._log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.__exit__(kind, error, trace)
        if error is None:
            self._checkpoints.settle()


def checkpoint_folder(stage_folder: Path) -> Path:
    return stage_folder / "checkpoints"
