"""The released folder: a Hugging Face checkpoint that carries how it was made and how to decode it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_parallel_r1.curriculum.model_card import Point, run_card, thinking_json
from megatron_parallel_r1.data.prompts import CHAT_TEMPLATE
from megatron_parallel_r1.model.gpt import Model
from megatron_parallel_r1.run.context import RunContext
from megatron_parallel_r1.run.save import save_model


def write_release(run: RunContext, model: Model, evaluations: Sequence[dict[str, Any]]) -> Path:
    """Writes `<run>/release` and returns its path.

    Beside the usual files: `thinking.json`, the decoding settings and prompt that training used, and
    `README.md`, the model card with this run's figures. `checkpoints_tools/release.py` makes the like of any
    checkpoint.
    """
    release = run.folder / "release"
    end = Point(run.recipe.stages[-1])
    extra = {
        "thinking.json": thinking_json(run.recipe, run.folder, end),
        "README.md": run_card(run.recipe, run.folder, run.shape, evaluations, end),
    }
    if run.tokenizer.chat_template is None:
        extra["chat_template.jinja"] = CHAT_TEMPLATE
    save_model(run, model, release, extra)
    return release
