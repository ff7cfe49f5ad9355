"""What a run is, in a few lines before its first step."""

from __future__ import annotations

from collections.abc import Collection

import torch

from megatron_parallel_r1.architecture.weight_table import parameter_count
from megatron_parallel_r1.config.data import DistilledTraces, data_sets
from megatron_parallel_r1.config.stages import AnyStage
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.sources import stage_items
from megatron_parallel_r1.utils.formats import count


def banner(run: RunContext, names: Collection[str], world: int) -> str:
    """Returns the folder, model, layout, engine and data of a run, and where it resumes.

    Args:
        names: the stages that this command runs.
        world: number of processes.
    """
    recipe, parallel, rollout = run.recipe, run.recipe.parallel, run.recipe.rollout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "data": world // (parallel.tensor * parallel.pipeline * parallel.context),
    }
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "not split"
    start = f"from {recipe.model.path}" if recipe.model.path else "from random weights"
    servers = f", {rollout.servers} servers" if rollout.servers else ""
    thinking = f"{recipe.thinking.mode}, format {recipe.thinking.format}"
    lines = {
        "run": f"{run.folder}{', resumed' if run.resumes else ''}",
        "model": f"{run.shape.family}, {count(parameter_count(run.shape))} parameters, "
        f"{recipe.model.dtype}, {start}",
        "layout": f"{world} {'process' if world == 1 else 'processes'} on {device}, {split}",
        "rollout": f"{rollout.engine}{servers}, mode {thinking}",
    }
    stages = [f"{stage.name}: {_stage(run, stage)}" for stage in recipe.stages if stage.name in names]
    labels = [*lines, "stages", *[""] * (len(stages) - 1)]
    rows = zip(labels, [*lines.values(), *stages], strict=True)
    return "\n".join(f"{label:<8} {value}" for label, value in rows)


def _stage(run: RunContext, stage: AnyStage) -> str:
    if run.was_finished(stage.name):
        return "done"
    steps = f"{stage.steps:,} steps of {stage.step_size:,}"
    done = [int(path.name[5:]) for path in run.stage_folder(stage.name).glob("checkpoints/step_*")]
    resumed = f", from step {max(done)}" if run.resumes and done else ""
    return f"{stage.kind}, {steps} on {_data(run, stage)}{resumed}"


def _data(run: RunContext, stage: AnyStage) -> str:
    if isinstance(stage.data, DistilledTraces):
        return f"traces of {stage.data.stage}"
    accounts = [stage_items(run.recipe, stage, data).account for data in data_sets(stage.data)]
    parts = [f"{each.kept:,} of {each.rows:,} rows of {each.source}" for each in accounts]
    return " + ".join(parts) or f"{stage.data.source} data"
