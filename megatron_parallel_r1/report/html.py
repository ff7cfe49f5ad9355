"""Builds `report.html`, one file without external resources, of one run or of several to compare.

The templates escape everything that a model or a user wrote. As a second line of defence the page's content
policy allows only its own script, by hash, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.report.charts import COLOURS, page_charts
from megatron_parallel_r1.report.evaluation_table import COLUMNS, accuracy_interval
from megatron_parallel_r1.report.headline import facts, recipe_differences, tiles
from megatron_parallel_r1.report.run_folder import RunFiles, read_run
from megatron_parallel_r1.report.showcase import choose_traces
from megatron_parallel_r1.utils import formats
from megatron_parallel_r1.utils.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def build_report(*folders: Path, out: Path | None = None) -> Path:
    """Writes the page of one or several run folders and returns its path.

    Args:
        out: default: `report.html` in the folder, or `comparison.html` in the working directory for several.

    Raises:
        UserError: a folder does not exist, holds no run, or one of its files is malformed; or the report
            cannot be written.
    """
    page = render_report(folders)
    report = out or (folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html"))
    try:
        write_atomically(report, page)
    except OSError as error:
        raise UserError(
            f"{report} cannot be written ({error.strerror or error}); name another file with --out"
        ) from None
    return report


def render_report(folders: Sequence[Path], watched: bool = False) -> bytes:
    """The page in UTF-8; a line says what a run lacks (evaluations, curves, traces, the recipe).

    Args:
        watched: the page asks its server for a newer version every few seconds.

    Raises:
        UserError: a folder does not exist, holds no run, or one of its files is malformed.
    """
    runs = _with_own_names([read_run(folder) for folder in folders], folders)
    files = ("axis.js", "charts.js", "traces.js", "report.js", *(["watch.js"] if watched else []))
    script = "\n".join((TEMPLATES / file).read_text(encoding="utf-8") for file in files)
    script = f'"use strict";\n{{\n{script}}}\n'
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            colours=COLOURS,
            facts=facts,
            tiles=tiles,
            tile_names=list(dict.fromkeys(tile.name for run in runs for tile in tiles(run))),
            columns=COLUMNS,
            accuracy_interval=accuracy_interval,
            charts=page_charts(runs),
            traces=choose_traces(runs),
            differences=recipe_differences(runs) if len(runs) > 1 else [],
            watched=watched,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return page.encode("utf-8", errors="replace")


def _with_own_names(runs: Sequence[RunFiles], folders: Sequence[Path]) -> list[RunFiles]:
    """Adds the parent folder's name to names that two runs share."""
    shared = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{folder.resolve().parent.name}/{run.name}") if shared[run.name] > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


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
