"""Whether a job's time limit, stop signal and grace leave time for its steps."""

from __future__ import annotations

from contextlib import suppress

from megatron_parallel_r1.cluster.job_spec import JobSpec
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.utils.jsonl import read_jsonl

# SLURM sends the signal up to a minute early.
EARLY_S = 60
# Fields of a record of metrics.jsonl whose sum is the time of its step.
_TIMES = ("time_s", "time_rollout_s", "time_train_s", "sync_time_s")
_LAST_STEPS = 5


def check_limit(limit_s: int, signal_s: int) -> None:
    """
    Args:
        limit_s: seconds from the start of a job to its time limit.
        signal_s: seconds from the stop signal to the time limit.

    Raises:
        UserError: the signal comes before the first step.
    """
    if limit_s <= signal_s + EARLY_S:
        raise UserError(
            f"the time limit of {limit_s} s leaves no time for a step: #SBATCH --signal stops the job "
            f"{signal_s} to {signal_s + EARLY_S} s before it; lengthen --time or shorten --signal"
        )


def slow_step_note(spec: JobSpec, ranks: int, has_gpus: bool, signal_s: int) -> str | None:
    """Returns a line if the longest step takes more than the signal leaves; None if it fits, or is unknown.

    Args:
        ranks: of the training.
        has_gpus: without, `plan` knows no times.
    """
    if spec.recipe is None:
        return None
    found = _last_steps(spec, spec.recipe) or (_planned_steps(spec, spec.recipe, ranks) if has_gpus else None)
    if found is None or found[0] < signal_s:
        return None
    seconds, source = found
    return (
        f"note: a step takes up to {seconds:.0f} s ({source}), and #SBATCH --signal stops the job "
        f"{signal_s} s before its time limit, which gives up the step under way; write "
        f"--signal=B:USR1@{int(1.5 * seconds)} and GRACE_S={int(1.4 * seconds)}"
    )


def _last_steps(spec: JobSpec, recipe: Recipe) -> tuple[float, str] | None:
    """The longest of the last steps that the run has recorded."""
    stages = [stage.name for stage in recipe.stages if spec.stage in (None, stage.name)]
    seconds = [
        sum(record.get(name) or 0 for name in _TIMES)
        for folder in spec.folders
        for stage in stages
        for record in read_jsonl(
            (folder if spec.stage else folder / stage) / "metrics.jsonl", missing_ok=True
        )[-_LAST_STEPS:]
    ]
    return (max(seconds), "the last attempt") if seconds else None


def _planned_steps(spec: JobSpec, recipe: Recipe, ranks: int) -> tuple[float, str] | None:
    from megatron_parallel_r1.planning.plan import plan  # imports torch

    with suppress(UserError):  # the model's folder may be missing on this machine
        stages = plan(recipe, ranks).stages
        seconds = [each.time.total for each in stages if spec.stage in (None, each.stage.name)]
        return (max(seconds), "`plan`") if seconds else None  # `plan` knows no time of a stage that distils
    return None
