"""Writes a first recipe for a model, data and a number of GPUs: `parallel-r1 init`.

Everything that it guesses (columns, layout, lengths) it tries: the data are read, the recipe is planned.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.architecture.weight_table import parameter_count
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.data.columns import find_columns
from megatron_parallel_r1.data.readers import read_examples, read_problems
from megatron_parallel_r1.data.schemas import CUSTOM, Columns, schema_of
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.planning.plan import GIB, Plan, plan
from megatron_parallel_r1.planning.published import published_config
from megatron_parallel_r1.utils.hub import local_folder

COLD_START = "Parallel-R1/Parallel-GSM8K"
ROWS = 200
PER_NODE = 8


@dataclass(frozen=True, slots=True)
class InitOptions:
    """What `parallel-r1 init` is given.

    Attributes:
        model: a Hugging Face folder, or a name on the Hub.
        data: problems for RL: a known data set, a file, or `NAME=FILE`.
        cold_start: worked examples with the tags, likewise; None: `COLD_START`.
        evaluation: held-out problems, likewise; None: no evaluation.
        columns: of `data` by role (`prompt`, `answer`); empty: found by their usual names.
        gpus: one process each; 0: this CPU.
        gpu: bytes of memory of each.
    """

    model: str
    data: str
    cold_start: str | None
    evaluation: str | None
    columns: dict[str, str]
    gpus: int
    gpu: int = 80 * GIB


@dataclass(frozen=True, slots=True)
class Starter:
    """A recipe that was planned.

    Attributes:
        text: the commented YAML.
        plan: on the options's GPUs, or on one process of this CPU.
    """

    text: str
    plan: Plan

    @property
    def summary(self) -> str:
        """One line about the layout."""
        if self.plan.recipe.rollout.engine == "native":
            return "for one process on this CPU"
        parallel, fullest = (
            self.plan.parallel,
            max(stage.memories[stage.fullest].total for stage in self.plan.stages),
        )
        return (
            f"{self.plan.world} GPUs = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
            f"{self.plan.data}, {fullest / GIB:.0f} of {self.plan.gpu / GIB:.0f} GiB while it learns"
        )


@dataclass(frozen=True, slots=True)
class _Data:
    """The `data` of RL, cold start and evaluation, as in a recipe."""

    problems: dict[str, Any]
    examples: dict[str, Any]
    held_out: dict[str, Any] | None


def starter(options: InitOptions, name: str) -> Starter:
    """Writes the recipe with the smallest tensor- and pipeline-parallel sizes that fit.

    Raises:
        UserError: the model is unknown, a data set cannot be read or has no usable column, or no layout fits.
    """
    shape, _ = published_config(local_folder(options.model))
    data = _Data(
        _data_set(options.data, options.columns, examples=False),
        _data_set(options.cold_start or COLD_START, {}, examples=True),
        None if options.evaluation is None else _data_set(options.evaluation, {}, examples=False),
    )
    for tensor, pipeline in _splits(shape, options.gpus):
        text = _recipe_text(options, name, shape, data, tensor, pipeline)
        recipe = Recipe.read(yaml.safe_load(text), name)
        planned = plan(recipe, max(1, options.gpus), options.gpu if options.gpus else sys.maxsize)
        if planned.fits:
            return Starter(text, planned)
    billions = parameter_count(shape) / 1e9
    raise UserError(
        f"{options.model}: {billions:.1f}B weights fit no layout of {options.gpus} GPUs with "
        f"{options.gpu / GIB:.0f} GiB; give more GPUs, or write a recipe like recipes/qwen3_235b_a22b"
    )


def _splits(shape: ModelConfig, gpus: int) -> Iterator[tuple[int, int]]:
    """Yields tensor- and pipeline-parallel sizes, those that communicate least first."""
    for size in (1, 2, 4, 8, 16, 32, 64):
        tensor = min(size, PER_NODE)
        while tensor > 1 and (shape.heads % tensor or shape.kv_heads % tensor or shape.ffn % tensor):
            tensor //= 2
        pipeline = size // tensor
        if size <= max(1, gpus) and max(1, gpus) % size == 0 and shape.layers % pipeline == 0:
            yield tensor, pipeline


def _data_set(wanted: str, columns: dict[str, str], examples: bool) -> dict[str, Any]:
    """Returns a recipe's `data` mapping. A file's first rows are read; what is on the Hub is not."""
    name, _, file = wanted.rpartition("=")
    path = Path(file)
    if not name and not path.exists():
        schema_of(wanted)  # an unknown name ends here
        return {"source": "dataset", "name": wanted, "bad_rows": "skip"}
    settings: dict[str, Any] = {"source": "dataset", "name": name or CUSTOM, "path": str(path)}
    if not name:
        settings["columns"] = columns or find_columns(path, examples)
    read = read_examples if examples else read_problems
    chosen = Columns(**settings["columns"]) if "columns" in settings else None
    account = read(settings["name"], path, columns=chosen, limit=ROWS, bad_rows="skip").account
    if account.bad:
        settings["bad_rows"] = "skip"
    return settings


def _recipe_text(
    options: InitOptions, name: str, shape: ModelConfig, data: _Data, tensor: int, pipeline: int
) -> str:
    layout: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
    if options.gpus:
        layout |= {"recompute": "selective", "sharded_optimizer": True}
        layout |= {"sequence": True} if tensor > 1 else {}
    response = min(3000 if options.gpus else 256, shape.max_positions // 2)
    prompt = min(1000, shape.max_positions - response)
    environment = Environment(
        loader=PackageLoader("megatron_parallel_r1.planning", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("starter.yaml.j2").render(
        name=name,
        model=_inline(options.model),
        gpus=options.gpus,
        servers=min(options.gpus, PER_NODE),
        layout=_inline(layout),
        response=response,
        prompt=prompt,
        # `replay` repeats the prefix of each path but the first.
        row=2 * (prompt + response),
        data=_inline(data.problems),
        cold_start=_inline(data.examples),
        evaluation=None if data.held_out is None else _inline(data.held_out),
    )


def _inline(value: object) -> str:
    """YAML of one line; JSON is YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(each)}" for key, each in value.items()) + "}"
    text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    return text if isinstance(value, (str, int, float)) else json.dumps(value)


def next_steps(options: InitOptions, out: Path) -> tuple[str, ...]:
    """Returns the commands that come after `init`."""
    fetch = () if local_folder(options.model).is_dir() else (f"parallel-r1 download {options.model}",)
    if not options.gpus:
        return (*fetch, f"parallel-r1 plan {out}", "parallel-r1 doctor", f"parallel-r1 curriculum {out}")
    nodes = ceil(options.gpus / PER_NODE)
    start = f"python slurm/launch.py curriculum {out} --nodes {nodes}"
    return (*fetch, f"parallel-r1 plan {out} --gpus {options.gpus}", "sbatch slurm/doctor.sh", start)
