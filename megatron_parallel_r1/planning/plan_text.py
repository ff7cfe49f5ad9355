"""Formats a plan as text for a terminal or a log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import prod

from megatron_parallel_r1.architecture.weight_table import padded_vocab, weight_table
from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.config.stages import Optimizer, RlStage, TrainingStage
from megatron_parallel_r1.planning.memory import MemoryUse, PipelinePart
from megatron_parallel_r1.planning.plan import GIB, Plan, StagePlan
from megatron_parallel_r1.rewards.base import Component
from megatron_parallel_r1.rewards.schedule import Constant, Linear, Window


def plan_text(plan: Plan) -> str:
    """Formats model, layout, weights of a rank, stages, memory, times and notes."""
    blocks = [
        _model(plan),
        _layout(plan),
        *(_weights(part, len(plan.parts)) for part in _unlike(plan.parts)),
        *(_stage(each, plan.data) for each in plan.stages),
        _totals(plan),
        _memory(plan),
        _times(plan),
        [f"note: {note}" for note in plan.notes],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _model(plan: Plan) -> list[str]:
    shape, source = plan.shape, plan.recipe.model
    whole = sum(prod(size) for weight in weight_table(shape) for _, size in weight.parts)
    return [
        f"{plan.recipe.name}: {source.path or 'a fresh model'}",
        f"  {shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads of {shape.head_dim} in "
        f"{shape.kv_heads} groups, ffn {shape.ffn}, vocabulary {shape.vocab:,}, "
        f"{'tied' if shape.tied else 'own'} head, {whole:,} weights in {source.dtype}",
    ]


def _layout(plan: Plan) -> list[str]:
    parallel, shape = plan.parallel, plan.shape
    size = parallel.tensor
    padded = padded_vocab(shape.vocab, size)
    sharers = plan.data * parallel.context
    lines = [
        f"{_many(plan.world, 'process', 'es')} = tensor {size} x pipeline {parallel.pipeline} x context "
        f"{parallel.context} x data {plan.data}",
        f"  a process has {shape.heads // size} heads, {shape.kv_heads // size} of keys and values, ffn "
        f"{shape.ffn // size}, {padded // size:,} of {padded:,} rows of the vocabulary",
        f"  sequence {'split' if parallel.sequence else 'whole'}, recompute {parallel.recompute}, optimizer "
        + (f"shared by {sharers}" if parallel.sharded_optimizer else "whole on each"),
    ]
    for part in plan.parts if len(plan.parts) > 1 else ():
        held = ", ".join(f"{chunk.start}..{chunk.stop - 1}" for chunk in part.chunks)
        lines.append(f"  pipeline rank {part.rank}: layers {held}")
    return lines


def _unlike(parts: Sequence[PipelinePart]) -> list[PipelinePart]:
    """Returns one part of each kind: the first, an inner one, the last."""
    return [part for part in parts if part.rank in (0, 1, len(parts) - 1)]


def _weights(part: PipelinePart, of: int) -> list[str]:
    """Returns a line for each kind of weight; all layers have the same."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, size in part.weights:
        kind = (re.sub(r"layers\.\d+\.", "layers.*.", name), size)
        counts[kind] = counts.get(kind, 0) + 1
    rows = [(f"{count} x", name, f"{list(size)}") for (name, size), count in counts.items()]
    where = f", pipeline rank {part.rank}" if of > 1 else ""
    return [f"weights of a process{where}: {part.elements:,}", *_columns(rows)]


def _stage(each: StagePlan, data: int) -> list[str]:
    stage = each.stage
    lines = [
        f"{stage.name}: {stage.kind}, {_many(stage.steps, 'step')}{_end(stage)}, mode {each.mode}, from "
        f"{each.start or 'the model'}{' with its optimizer' if stage.carry_optimizer else ''}"
    ]
    if isinstance(stage, RlStage):
        lines += [
            f"  {each.rows:,} traces a step: {stage.prompts_per_step} prompts x {stage.samples_per_prompt}; "
            f"draws at most {each.sampled:,} tokens a step, {each.sampled * stage.steps:.3g} in all",
            "  reward: " + " + ".join(map(_component, stage.reward.make().components)),
            f"  objective: {_objective(stage.objective)}",
        ]
    else:
        lines.append(f"  {each.rows:,} examples a step")
    return [
        *lines,
        f"  trains on at most {each.trained:,} tokens a step, {each.trained * stage.steps:.3g} in all: "
        f"{_many(each.updates, 'update')} x {_many(each.micro_batches, 'micro-batch', 'es')} of at most "
        f"{each.row:,} tokens on each of {_many(data, 'copy', of='copies')}",
        f"  learning rate: {_rate(stage.optimizer)}",
    ]


def _end(stage: TrainingStage) -> str:
    return (
        ""
        if stage.early_stopping is None
        else f" at most, until {stage.early_stopping.metric} gets no better"
    )


def _objective(objective: Objective) -> str:
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    held = "no KL" if objective.kl == "none" else f"KL {objective.kl} in the {objective.kl_in}"
    return (
        f"{objective.advantage}, loss by {objective.aggregation}, {objective.surrogate} ratio by "
        f"{objective.ratio} in {low:g}..{high:g}, {held}, correction {objective.correction}"
    )


def _component(component: Component) -> str:
    match component.weight:
        case Constant(value=value):
            return component.name if value == 1 else f"{value:g} x {component.name}"
        case Linear(start=start, end=end, steps=steps, begin=begin):
            return f"{start:g} to {end:g} over steps {begin + 1}..{begin + steps} x {component.name}"
        case Window(window=window, share=share, bonus=bonus):
            return f"{bonus:g} x {component.name} in the last {round(window * share)} of every {window} steps"


def _rate(optimizer: Optimizer) -> str:
    rise = (
        f"rises to {optimizer.lr:g} over {_many(optimizer.warmup_steps, 'step')}"
        if optimizer.warmup_steps
        else ""
    )
    if optimizer.final_lr_fraction == 1:
        return f"{rise}, then constant" if rise else f"{optimizer.lr:g}, constant"
    falls = f"falls linearly to {optimizer.final_lr_fraction * optimizer.lr:g}"
    return f"{rise}, then {falls}" if rise else f"{optimizer.lr:g}, {falls}"


def _totals(plan: Plan) -> list[str]:
    steps = sum(each.stage.steps for each in plan.stages)
    trained = sum(each.trained * each.stage.steps for each in plan.stages)
    sampled = sum(each.sampled * each.stage.steps for each in plan.stages)
    return [
        f"in all: {_many(len(plan.stages), 'stage')}, {steps:,} steps, at most {sampled:.3g} tokens sampled "
        f"and {trained:.3g} trained on"
    ]


def _memory(plan: Plan) -> list[str]:
    names = [field.name for field in fields(MemoryUse)]
    rows: list[tuple[str, ...]] = [("stage", *names, "total", "")]
    for each in plan.stages:
        where = f"pipeline rank {each.fullest}" if len(plan.parts) > 1 else ""
        rows.append(_memory_row(each.stage.name, each.memories[each.fullest], where, plan.gpu))
        if each.evaluation is not None:
            rows.append(_memory_row(f"{each.stage.name} evaluation", each.evaluation, "", plan.gpu))
    return [f"memory of the fullest process, GiB of {plan.gpu / GIB:.0f} (estimate)", *_columns(rows)]


def _memory_row(name: str, memory: MemoryUse, where: str, gpu: int) -> tuple[str, ...]:
    values = [*(getattr(memory, field.name) for field in fields(MemoryUse)), memory.total]
    over = "MORE THAN THE GPU HAS" if memory.total > gpu else ""
    return (name, *(f"{value / GIB:.2f}" for value in values), " ".join(filter(None, (where, over))))


def _times(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "sync", "rollout", "logprobs", "update", "step", "stage, hours")]
    for each in plan.stages:
        time = each.time
        phases = (time.sync, time.rollout, time.logprobs, time.update, time.total)
        hours = each.stage.steps * time.total / 3600
        rows.append((each.stage.name, *(f"{seconds:.3g}" for seconds in phases), f"{hours:.3g}"))
    name = f"{plan.machine.name}: seconds of a step whose rows are all as long as they may be (estimate)"
    return [name, *_columns(rows)]


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()


def _many(count: int, what: str, ending: str = "s", of: str | None = None) -> str:
    return f"{count:,} {what if count == 1 else of or what + ending}"
