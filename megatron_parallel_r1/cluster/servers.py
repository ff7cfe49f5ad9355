"""The rollout servers beside a job's trainers: which weights they begin with, and how they sample."""

from __future__ import annotations

from pathlib import Path

from megatron_parallel_r1.cluster.job_spec import Order
from megatron_parallel_r1.config.stages import Stage
from megatron_parallel_r1.errors import UserError


def server_words(order: Order, engine: str) -> list[str]:
    """For `parallel-r1 serve-rollout`, of an RL stage; the trainer sends its own weights before it rolls out.

    Raises:
        UserError: as `check_served`, or there is no folder that they could begin with.
    """
    check_served(order, engine)
    recipe, stage = order.recipe, stage_of(order)
    before = recipe.start_of(stage)
    folder = recipe.model.path if before is None else recipe.out / recipe.name / before / "model"
    if folder is None:
        raise UserError(f"stage {stage.name} begins with a fresh model, which servers cannot load")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"stage {stage.name} starts from {folder}, which is not there; run that stage first")
    isolated = engine == "sglang" and recipe.thinking_of(stage).mode == "isolated"
    return ["--checkpoint", str(folder), *(["--isolated"] if isolated else [])]


def check_served(order: Order, engine: str) -> None:
    """
    Raises:
        UserError: the run cannot take the servers that the job starts for it.
    """
    if order.recipe.seeds is not None:
        raise UserError("ROLLOUT_NODES: the servers begin with the weights of one run; give seed, not seeds")
    added = (f"rollout.engine={engine}", "rollout.urls_file=urls")
    try:
        Order.read(order.kind, (*order.words, *added))
    except UserError as error:
        raise UserError(
            f"{error}; ROLLOUT_NODES adds rollout.engine={engine} and rollout.urls_file to the recipe: make "
            "it fit, or set ROLLOUT_NODES=0"
        ) from None


def stage_of(order: Order) -> Stage:
    stage = next((stage for stage in order.recipe.stages if stage.name == order.stage), None)
    assert stage and order.kind == "rl", "other jobs have no servers"
    return stage
