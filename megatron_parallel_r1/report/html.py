"""Builds `report.html`, one file without external resources.

The templates escape everything that a model or a user wrote. As a second line of defence the page's content
policy allows only its own script, by hash, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.curves import draw_curves
from megatron_parallel_r1.report.evaluation_table import COLUMNS, accuracy_interval, accuracy_text
from megatron_parallel_r1.report.run_folder import RunFiles, read_run
from megatron_parallel_r1.report.traces import choose_traces
from megatron_parallel_r1.utils import formats
from megatron_parallel_r1.utils.files import write_atomically


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure of the headline, with a note on its origin."""

    name: str
    value: str
    note: str


def build_report(run_folder: Path, out: Path | None = None) -> Path:
    """Writes `run_folder/report.html`, or `out`, and returns its path.

    Replaces what the run lacks (evaluations, curves, traces, the recipe) by a line that says so.

    Raises:
        UserError: the folder does not exist, holds no run, or one of its files is malformed; or the report
            cannot be written.
    """
    run = read_run(run_folder)
    template = _environment().get_template("report.html.j2")
    script = _script()
    page = template.render(
        run=run,
        facts=_facts(run),
        tiles=_tiles(run),
        columns=COLUMNS,
        accuracy_interval=accuracy_interval,
        curves=draw_curves(run),
        traces=choose_traces(run),
        script=script,
        script_hash=_hash(script),
    )
    report = out or run_folder / "report.html"
    try:
        write_atomically(report, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{report} cannot be written ({error.strerror or error}); name another file with --out"
        ) from None
    return report


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_parallel_r1.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = formats.number
    return environment


def _script() -> Markup:
    """The page's script, exactly as between its tags."""
    text = (Path(__file__).parent / "templates" / "report.js").read_text(encoding="utf-8")
    return Markup(text)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _facts(run: RunFiles) -> list[str]:
    """Stages, steps, tokens and time."""
    facts = []
    if run.stages:
        names = " → ".join(stage.name for stage in run.stages)
        facts.append(names)
        facts.append(f"{sum(stage.last_step for stage in run.stages):,} steps")
    tokens = sum(stage.sum("tokens") for stage in run.stages)
    if tokens:
        facts.append(f"{formats.count(int(tokens))} tokens")
    seconds = sum(s.sum("time_s", "time_rollout_s", "time_train_s") for s in run.stages)
    if seconds:
        facts.append(f"{formats.duration(seconds)} of training")
    return facts


def _tiles(run: RunFiles) -> list[Tile]:
    """The headline: the last evaluation against the one before RL, and the exactness."""
    tiles = []
    if run.evals:
        last, base = run.evals[-1], _base(run)
        if last.get("accuracy") is not None:
            value = accuracy_text(last)
            tiles.append(Tile("accuracy, held-out", value, _before(base, "accuracy")))
        if last.get("parallel_ratio") is not None:
            value = formats.percent(last["parallel_ratio"])
            tiles.append(Tile("traces that think in parallel", value, _before(base, "parallel_ratio")))
        if last.get("well_formed_blocks") is not None:
            value = formats.percent(last["well_formed_blocks"])
            tiles.append(Tile("well-formed blocks", value, _before(base, "well_formed_blocks")))
        if last.get("critical_length") is not None and last.get("length"):
            value = f"{formats.number(last['critical_length'])} tokens"
            note = f"of {formats.number(last['length'])} in the whole response"
            tiles.append(Tile("critical path", value, note))
    mismatches = _values(run, "mismatch_max")
    if mismatches:
        note = "largest |Δ log p| of rollout and trainer"
        tiles.append(Tile("mismatch", formats.number(max(mismatches)), note))
    return tiles


def _base(run: RunFiles) -> dict[str, Any] | None:
    """The evaluation to compare the last one with: that of the last SFT stage, else the first; same mode."""
    last = run.evals[-1]
    alike = [r for r in run.evals if r.get("mode") == last.get("mode") and r is not last]
    kinds = {stage.name: stage.kind for stage in run.stages}
    after_sft = [record for record in alike if kinds.get(record["stage"]) == "sft"]
    return next(iter(after_sft[-1:] or alike[:1]), None)


def _before(base: dict[str, Any] | None, key: str) -> str:
    if base is None or base.get(key) is None:
        return ""
    return f"{formats.percent(base[key])} after {base['stage']}"


def _values(run: RunFiles, key: str) -> Sequence[float]:
    rows = [row for stage in run.stages for row in stage.metrics]
    return [row[key] for row in rows if row.get(key) is not None]
