"""Writes a release folder from any checkpoint, like `curriculum/run.py` at the end of a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_parallel_r1.checkpoint_formats.companions import generation_of
from megatron_parallel_r1.checkpoint_formats.hf_folder import SHARD_BYTES
from megatron_parallel_r1.config.reader import read_run_recipe
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.conversion.checkpoint_source import CheckpointSource, open_source
from megatron_parallel_r1.conversion.to_hf import write_hf_folder
from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.curriculum.model_card import (
    ReleasePoint,
    card,
    licence,
    lineage,
    run_card,
    thinking_json,
)
from megatron_parallel_r1.data.prompts import chat_template_for
from megatron_parallel_r1.data.tokenizers import check_tokenizer, open_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.checkpoints import stored_decoding
from megatron_parallel_r1.run.folder import past_evaluations
from megatron_parallel_r1.thought.format_settings import format_of, stored_format
from megatron_parallel_r1.thought.formats import ThinkingFormat
from megatron_parallel_r1.thought.tags import Tags
from megatron_parallel_r1.thought.tokenizer import GENERATION, eos_ids, save_tokenizer


@dataclass(frozen=True, slots=True)
class ReleaseInputs:
    """The sources of a release.

    Attributes:
        source: a Hugging Face folder, a Megatron checkpoint, or a run folder (the model of its last stage).
        like: the folder with config.json and tokenizer; None: `source`.
        run: the run folder, for settings and card; None: `source`, if that is one.
        stage: the run's last stage that trained it; None: derived from the path of `source` in the run.
        thinking: a thinking.json, if there is no run with decoding settings.
        evaluations: Markdown tables of `eval/run.py` for the card.
    """

    source: Path
    like: Path | None = None
    run: Path | None = None
    stage: str | None = None
    thinking: Path | None = None
    evaluations: Sequence[Path] = ()


def write_release(
    inputs: ReleaseInputs,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    advance: Advance = lambda count: None,
    begin: Advance = lambda total: None,
) -> None:
    """Writes weights, config, tokenizer with tags, chat template, generation config, thinking.json and card.

    Raises:
        UserError: a part is missing or does not fit, before anything is written; or `out` cannot be written.
    """
    run, source = inputs.run, inputs.source
    trained: tuple[Recipe, Path, ReleasePoint] | None = None
    if run is None and (source / "stages.json").is_file():
        run = source
    if run is not None:
        recipe = _recipe(run)
        at = _point(recipe, run, inputs)
        trained = (recipe, run, at)
        if source == run:
            source = run / at.stage.name / "model"
            if not source.is_dir():
                raise UserError(f"{run}: {at.stage.name} is not finished; give a checkpoint and --run {run}")
    like = inputs.like
    opened = open_source(source, like)
    settings = inputs.thinking or opened.like / "thinking.json"
    by_run = trained is not None and inputs.thinking is None
    format = (
        format_of(trained[0].thinking.format) if trained is not None and by_run else stored_format(settings)
    )
    extra = _tokenizer_files(opened, run, format)
    more = "\n\n".join(_text(file) for file in inputs.evaluations)
    if trained is not None and inputs.thinking is None:
        extra["thinking.json"] = thinking_json(*trained).encode()
    else:
        if not settings.is_file():
            raise UserError(f"{settings} is missing; give --thinking, or --run")
        extra["thinking.json"] = settings.read_bytes()
    if trained is not None:
        recipe, run, at = trained
        text = run_card(recipe, run, opened.config, _evaluations(recipe, run, at), at)
        text += f"\n{more}\n" if more else ""
    else:
        decoding = stored_decoding(settings).thinking
        unknown = "It was released without the folder of the run that trained it."
        figures = more or "None was given."
        text = card(out.name, opened.config, decoding, licence(opened.like), unknown, unknown, figures)
    extra["README.md"] = text.encode()
    write_hf_folder(opened, out, dtype, shard_bytes, replace, extra, advance, begin)


def _recipe(run: Path) -> Recipe:
    file = run / "config.yaml"
    try:
        return read_run_recipe(file)
    except FileNotFoundError:
        raise UserError(f"{run}: no config.yaml; give a run folder") from None


def _point(recipe: Recipe, run: Path, inputs: ReleaseInputs) -> ReleasePoint:
    """Returns the stage, and the step in it, that is released.

    Raises:
        UserError: the stage is ambiguous, or the run has no such stage.
    """
    stages = {stage.name: stage for stage in recipe.trained_stages}
    last = recipe.trained_stages[-1]
    source, folder = inputs.source.resolve(), run.resolve()
    inside = source.relative_to(folder).parts if source.is_relative_to(folder) else ()
    name: str | None
    if inputs.stage is not None:
        name = inputs.stage
    elif source == folder or inside == ("release",):
        name = last.name
    elif inside:
        name = inside[0]
    else:
        name = last.name if len(stages) == 1 else None
    if name not in stages:
        problem = (
            f"the run {run} has no stage {name}" if name else f"which stage of {run} trained {inputs.source}"
        )
        raise UserError(f"{problem}; give --stage, one of {', '.join(stages)}")
    step = re.fullmatch(r"step_(\d+)", source.name)
    return ReleasePoint(stages[name], int(step[1]) if step else None)


def _evaluations(recipe: Recipe, run: Path, at: ReleasePoint) -> list[dict[str, Any]]:
    """Returns the evaluations of the stages and steps that trained the weights; all for a whole run."""
    records = past_evaluations(run)
    if at == ReleasePoint(recipe.trained_stages[-1]):
        return records
    last_step = {stage.name: math.inf for stage in lineage(recipe, at.stage)}
    if at.step is not None:
        last_step[at.stage.name] = at.step
    return [record for record in records if record["step"] <= last_step.get(record["stage"], -1)]


def _tokenizer_files(opened: CheckpointSource, run: Path | None, format: ThinkingFormat) -> dict[str, bytes]:
    """Returns the tokenizer's files with a chat template, and a generation config that ends at EOS.

    Raises:
        UserError: a tag is missing, or the model has no row for it.
    """
    folder = run / "tokenizer" if run is not None and (run / "tokenizer").is_dir() else opened.like
    tokenizer = open_tokenizer(folder)
    try:
        Tags.of(tokenizer, eos_ids(opened.like), format)
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}; give --like, or --run, with the tokenizer of the training"
        ) from None
    if max(tokenizer.get_vocab().values()) >= opened.config.vocab:
        raise UserError(f"{folder}: the tokenizer has tokens that the model lacks; use those of one run")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template_for(tokenizer)
        check_tokenizer(tokenizer, folder)
    with TemporaryDirectory() as place:
        save_tokenizer(tokenizer, place)
        saved = [path for path in Path(place).rglob("*") if path.is_file()]
        files = {str(path.relative_to(place)): path.read_bytes() for path in saved}
    generation, special = generation_of(tokenizer, opened.like)
    files[GENERATION] = json.dumps(generation, indent=2).encode() + b"\n"
    opened.config_json.update(special)
    return files


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a table of eval/run.py") from None
