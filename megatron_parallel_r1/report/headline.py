"""The headline of a run: its size, last evaluation and exactness; and the keys in which recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_parallel_r1.report.evaluation_table import accuracy_text
from megatron_parallel_r1.report.run_folder import RunFiles
from megatron_parallel_r1.utils import formats
from megatron_parallel_r1.utils.jsonl import JsonRecord


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure of the headline, with a note on its origin."""

    name: str
    value: str
    note: str


def facts(run: RunFiles) -> list[str]:
    """Stages, steps, tokens and time."""
    found = []
    if run.stages:
        found.append(" → ".join(stage.name for stage in run.stages))
        found.append(f"{sum(stage.last_step for stage in run.stages):,} steps")
    tokens = sum(stage.sum("tokens") for stage in run.stages)
    if tokens:
        found.append(f"{formats.count(int(tokens))} tokens")
    seconds = sum(s.sum("time_s", "time_rollout_s", "time_train_s") for s in run.stages)
    if seconds:
        found.append(f"{formats.duration(seconds)} of training")
    return found


def tiles(run: RunFiles) -> list[Tile]:
    """The last evaluation against the one before RL, and the exactness."""
    found = []
    if run.evals:
        last, base = run.evals[-1], _base(run)
        if last.get("accuracy") is not None:
            found.append(Tile("accuracy, held-out", accuracy_text(last), _before(base, "accuracy")))
        if last.get("parallel_ratio") is not None:
            value = formats.percent(last["parallel_ratio"])
            found.append(Tile("traces that think in parallel", value, _before(base, "parallel_ratio")))
        if last.get("well_formed_blocks") is not None:
            value = formats.percent(last["well_formed_blocks"])
            found.append(Tile("well-formed blocks", value, _before(base, "well_formed_blocks")))
        if last.get("critical_length") is not None and last.get("length"):
            value = f"{formats.number(last['critical_length'])} tokens"
            note = f"of {formats.number(last['length'])} in the whole response"
            found.append(Tile("critical path", value, note))
    rows = [row for stage in run.stages for row in stage.metrics]
    mismatches = [row["mismatch_max"] for row in rows if row.get("mismatch_max") is not None]
    if mismatches:
        note = "largest |Δ log p| of rollout and trainer"
        found.append(Tile("mismatch", formats.number(max(mismatches)), note))
    return found


def _base(run: RunFiles) -> JsonRecord | None:
    """The evaluation to compare the last one with: that of the last SFT stage, else the first; same mode."""
    last = run.evals[-1]
    alike = [r for r in run.evals if r.get("mode") == last.get("mode") and r is not last]
    kinds = {stage.name: stage.kind for stage in run.stages}
    after_sft = [record for record in alike if kinds.get(record["stage"]) == "sft"]
    return next(iter(after_sft[-1:] or alike[:1]), None)


def _before(base: JsonRecord | None, key: str) -> str:
    if base is None or base.get(key) is None:
        return ""
    return f"{formats.percent(base[key])} after {base['stage']}"


def recipe_differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The keys whose values differ between the recipes of `runs`, each with its value in every run."""
    flat = [dict(_flatten("", yaml.safe_load(run.config) or {})) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    values = {key: [recipe.get(key, formats.NONE) for recipe in flat] for key in keys}
    return [(key, each) for key, each in values.items() if len(set(each)) > 1]


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, str(value)
