"""The released folder: a Hugging Face checkpoint that carries how it was made and how to decode it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from megatron_parallel_r1 import config
from megatron_parallel_r1.curriculum.folder import steps_done
from megatron_parallel_r1.curriculum.keeping import save_model
from megatron_parallel_r1.curriculum.workbench import Workbench
from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.model.weights import table
from megatron_parallel_r1.report.tables import eval_markdown

_BLOCKS = (
    "that thinks in parallel: it opens `<Parallel>` blocks, reads their `<Path>`s in a `<Summary>`, goes on;"
)
_HABIT = {
    "isolated": f"{_BLOCKS} paths do not see one another",
    "replay": f"{_BLOCKS} paths do not see one another, a summary reads them as one text",
    "causal": f"{_BLOCKS} each path sees the ones before it",
    "sequential": "that thinks in one chain, the baseline of parallel thinking",
}


def write_release(bench: Workbench, model: Model, evaluations: Sequence[dict[str, Any]]) -> Path:
    """Writes `<run>/release` and returns its path.

    Beside the usual files: `thinking.json`, the decoding settings and prompt that training used, and
    `README.md`, the model card with this run's figures.
    """
    release = bench.folder / "release"
    last = bench.recipe.stages[-1]
    thinking = asdict(bench.recipe.thinking_of(last)) | {
        "prompt": bench.recipe.prompt,
        "prompt_template": TEMPLATES[bench.recipe.prompt],
    }
    extra = {
        "thinking.json": json.dumps(thinking, indent=2) + "\n",
        "README.md": _card(bench, evaluations),
    }
    save_model(bench, model, release, extra)
    return release


def _card(bench: Workbench, evaluations: Sequence[dict[str, Any]]) -> str:
    recipe = bench.recipe
    lineage = _lineage(recipe)
    thinking = recipe.thinking_of(lineage[-1])
    stages = "\n".join(
        f"| {stage.name} | {stage.kind} | {_data(stage)} | {steps_done(bench.folder, stage)} |"
        for stage in lineage
    )
    figures = eval_markdown(evaluations) if evaluations else "This run was not evaluated."
    parameters = sum(prod(shape) for weight in table(bench.shape) for _, shape in weight.parts)
    return f"""---
library_name: transformers
license: apache-2.0
tags: [parallel-thinking, reinforcement-learning, grpo]
---

# {recipe.name}

A Qwen3 of {parameters / 1e6:.2f} M parameters {_HABIT[thinking.mode]}.
Trained with megatron_parallel_r1 after Parallel-R1 (arXiv 2509.07980).

`AutoModelForCausalLM` loads it. To decode as trained, use the settings in `thinking.json` with
megatron_parallel_r1.

## Training

| stage | kind | data | steps |
|---|---|---|---|
{stages}

Seed {recipe.seed}; the last stage in mode `{thinking.mode}` with {thinking.paths} paths a block.

## Evaluation

Plain accuracy on held-out problems, ± half the 95 % interval.

{figures}
"""


def _lineage(recipe: config.Recipe) -> list[config.SftStage | config.RlStage]:
    """The stages that the released weights went through, the first one first."""
    by_name = {stage.name: stage for stage in recipe.stages}
    chain = [recipe.stages[-1]]
    while (before := recipe.start_of(chain[0])) is not None:
        chain.insert(0, by_name[before])
    return chain


def _data(stage: config.SftStage | config.RlStage) -> str:
    data = stage.data
    if isinstance(data, config.DataSet):
        return data.name
    kind = getattr(data, "kind", None)
    return f"{data.source} ({kind})" if kind else data.source
