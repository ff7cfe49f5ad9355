"""A folder ready to upload, of any checkpoint: what `curriculum/release.py` writes at the end of a run."""

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

from megatron_parallel_r1.checkpoint_formats.hf_folder import SHARD_BYTES
from megatron_parallel_r1.config.reader import read_run_recipe
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.conversion.checkpoint_source import Side, open_side
from megatron_parallel_r1.conversion.to_hf import write_hf
from megatron_parallel_r1.conversion.to_megatron import Advance
from megatron_parallel_r1.curriculum.model_card import Point, card, licence, lineage, run_card, thinking_json
from megatron_parallel_r1.data.prompts import CHAT_TEMPLATE
from megatron_parallel_r1.data.tokenizers import open_tokenizer
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.checkpoints import stored_decoding
from megatron_parallel_r1.run.folder import past_evaluations
from megatron_parallel_r1.thought.tags import Tags


@dataclass(frozen=True, slots=True)
class Given:
    """Where a release's parts come from.

    Attributes:
        source: a Hugging Face folder, a Megatron checkpoint, or a run's folder: the model of its last stage.
        like: the folder with config.json and tokenizer, None: `source` has them.
        run: the folder of the run that trained it, for settings and card; None: `source`, if that is one.
        stage: of the run, that trained it last; None: it is told by where in the run `source` is.
        thinking: a thinking.json, where no run tells how to decode.
        evaluations: Markdown files for the card, as `eval/run.py` writes them.
    """

    source: Path
    like: Path | None = None
    run: Path | None = None
    stage: str | None = None
    thinking: Path | None = None
    evaluations: Sequence[Path] = ()


def write_release(
    given: Given,
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
    run, source = given.run, given.source
    recipe = at = None
    if run is None and (source / "stages.json").is_file():
        run = source
    if run is not None:
        recipe = _recipe(run)
        at = _point(recipe, run, given)
        if source == run:
            source = run / at.stage.name / "model"
            if not source.is_dir():
                raise UserError(f"{run}: {at.stage.name} is not done; name the checkpoint and --run {run}")
    like = given.like
    side = open_side(source, like, once=True)
    extra = _tokenizer_files(side, run)
    more = "\n\n".join(_text(file) for file in given.evaluations)
    if recipe is not None and given.thinking is None:
        extra["thinking.json"] = thinking_json(recipe, run, at).encode()
    else:
        file = given.thinking or side.like / "thinking.json"
        if not file.is_file():
            raise UserError(f"{file} is missing; give --thinking, or the --run whose settings hold")
        extra["thinking.json"] = file.read_bytes()
    if recipe is not None:
        text = run_card(recipe, run, side.shape, _evaluations(recipe, run, at), at)
        text += f"\n{more}\n" if more else ""
    else:
        told = stored_decoding(given.thinking or side.like / "thinking.json").thinking
        unknown = "It was released without the folder of the run that trained it."
        text = card(
            out.name, side.shape, told, licence(side.like), unknown, unknown, more or "None was given."
        )
    extra["README.md"] = text.encode()
    write_hf(side, out, dtype, shard_bytes, replace, extra, advance, begin)


def _recipe(run: Path) -> Recipe:
    file = run / "config.yaml"
    try:
        return read_run_recipe(file)
    except FileNotFoundError:
        raise UserError(f"{run}: no config.yaml; give the folder of a run") from None


def _point(recipe: Recipe, run: Path, given: Given) -> Point:
    """Which stage, and which of its steps, is released.

    Raises:
        UserError: it cannot be told, or the run has no such stage.
    """
    stages = {stage.name: stage for stage in recipe.stages}
    last = recipe.stages[-1]
    source, folder = given.source.resolve(), run.resolve()
    inside = source.relative_to(folder).parts if source.is_relative_to(folder) else ()
    if given.stage is not None:
        name = given.stage
    elif source == folder or inside == ("release",):
        name = last.name
    elif inside:
        name = inside[0]
    else:
        name = last.name if len(stages) == 1 else None
    if name not in stages:
        told = (
            f"the run {run} has no stage {name}" if name else f"which stage of {run} trained {given.source}"
        )
        raise UserError(f"{told}; give --stage, one of {', '.join(stages)}")
    step = re.fullmatch(r"step_(\d+)", source.name)
    return Point(stages[name], int(step[1]) if step else None)


def _evaluations(recipe: Recipe, run: Path, at: Point) -> list[dict[str, Any]]:
    """Those of the stages that the weights went through, as far as they went; of a whole run all."""
    records = past_evaluations(run)
    if at == Point(recipe.stages[-1]):
        return records
    most = {stage.name: math.inf for stage in lineage(recipe, at.stage)}
    if at.step is not None:
        most[at.stage.name] = at.step
    return [record for record in records if record["step"] <= most.get(record["stage"], -1)]


def _tokenizer_files(side: Side, run: Path | None) -> dict[str, bytes]:
    """The tokenizer's files, with a chat template, and what makes generation end at its eos.

    Raises:
        UserError: a tag is missing, or the model has no row for one.
    """
    folder = run / "tokenizer" if run is not None and (run / "tokenizer").is_dir() else side.like
    tokenizer = open_tokenizer(folder)
    try:
        Tags.of(tokenizer)
    except ValueError as error:
        raise UserError(
            f"{folder}: {error}; give --like, or --run, with the tokenizer of the training"
        ) from None
    if max(tokenizer.get_vocab().values()) >= side.shape.vocab:
        raise UserError(f"{folder}: the tokenizer has tokens that the model lacks; take both from one run")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    usual = side.like / "generation_config.json"
    generation = json.loads(usual.read_text()) if usual.is_file() else {"do_sample": True}
    files["generation_config.json"] = json.dumps(generation | stops, indent=2).encode() + b"\n"
    side.config.update(stops)
    return files


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a table of eval/run.py") from None
