"""The released folder: a Hugging Face checkpoint that carries how it was made and how to decode it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from megatron_parallel_r1 import config
from megatron_parallel_r1.curriculum.workbench import Workbench
from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.model.gpt import PathGPT
from megatron_parallel_r1.model.hf import save_hf_folder
from megatron_parallel_r1.model.weights import hf_tensors, table
from megatron_parallel_r1.report.tables import eval_markdown


def write_release(bench: Workbench, model: PathGPT, evaluations: Sequence[dict[str, Any]]) -> Path:
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
    save_hf_folder(release, bench.shape, hf_tensors(model), bench.tokenizer, extra)
    return release


def _card(bench: Workbench, evaluations: Sequence[dict[str, Any]]) -> str:
    recipe = bench.recipe
    stages = "\n".join(
        f"| {stage.name} | {stage.kind} | {_data(stage)} | {stage.steps} |" for stage in recipe.stages
    )
    figures = eval_markdown(evaluations) if evaluations else "This run was not evaluated."
    parameters = sum(prod(shape) for weight in table(bench.shape) for _, shape in weight.parts)
    return f"""---
library_name: transformers
license: apache-2.0
tags: [parallel-thinking, reinforcement-learning, grpo]
---

# {recipe.name}

A Qwen3 of {parameters / 1e6:.2f} M parameters that thinks in parallel: it opens `<Parallel>` blocks whose
`<Path>`s do not see one another, reads them in a `<Summary>`, and goes on. Trained with
megatron_parallel_r1 after Parallel-R1 (arXiv 2509.07980).

`AutoModelForCausalLM` loads it. Plain generation writes paths one after the other, each seeing the last;
to decode as trained, use the settings in `thinking.json` with megatron_parallel_r1.

## Training

| stage | kind | data | steps |
|---|---|---|---|
{stages}

Seed {recipe.seed}; rollouts in mode `{recipe.thinking.mode}`, {recipe.thinking.paths} paths a block.

## Evaluation

Plain accuracy on held-out problems, ± half the 95 % interval.

{figures}
"""


def _data(stage: config.SftStage | config.RlStage) -> str:
    data = stage.data
    if isinstance(data, config.DataSet):
        return data.name
    kind = getattr(data, "kind", None)
    return f"{data.source} ({kind})" if kind else data.source
