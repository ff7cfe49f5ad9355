"""Checkpoints to evaluate: a release, a stage's model, any Hugging Face folder, or the stages of a run.

The decoding settings are in a checkpoint's `thinking.json`; for stages of older runs, in the run's recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_parallel_r1.config.reader import read_run_recipe
from megatron_parallel_r1.data.prompts import BOS_CHAT_TEMPLATE, CHAT_TEMPLATE, TEMPLATES, template_text
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.evaluation.modes import Decoding
from megatron_parallel_r1.report.run_folder import read_run
from megatron_parallel_r1.rollout.settings import Thinking

_CHUNK = 1 << 24
# The files that decide a response, for given decoding settings.
_CONTENT = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: shown in tables.
        folder: a Hugging Face folder.
        decoding: settings of its training.
        source: the file with `decoding`; None: there is none, it is the default.
        step: its training steps, None where unknown.
    """

    name: str
    folder: Path
    decoding: Decoding
    source: Path | None
    step: int | None = None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens `folder`, which may also be a run's folder (its release) or a stage's (its model).

    Raises:
        UserError: it holds no model, or its thinking.json is invalid.
    """
    for inner in ("release", "model"):
        if not (folder / "config.json").is_file() and (folder / inner / "config.json").is_file():
            return open_checkpoint(folder / inner)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; give the folder of a released or a Hugging Face model")
    real = folder.resolve()
    settings = real / "thinking.json"
    if settings.is_file():
        name = real.parent.name if real.name in ("release", "model") else real.name
        return Checkpoint(name, folder, stored_decoding(settings), settings, _stored_step(settings))
    run = real.parent.parent
    if real.name == "model" and (run / "stages.json").is_file():
        for checkpoint in stages_of(run):
            if checkpoint.folder.resolve() == real:
                return checkpoint
    return Checkpoint(real.name, folder, Decoding(Thinking(), TEMPLATES["parallel"]), None)


def stages_of(run: Path) -> list[Checkpoint]:
    """The finished stages of a run folder, in order; `step` counts from the weights that the run began with.

    Raises:
        UserError: it is not a run folder, its recipe cannot be read, or no stage is done.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{run}: no run folder (config.yaml is missing); give one, or checkpoints by --checkpoint"
        )
    recipe = read_run_recipe(config)
    last_steps = read_run(run).last_steps
    total: dict[str, int] = {}
    checkpoints = []
    for stage in recipe.trained_stages:
        before = recipe.start_of(stage)
        total[stage.name] = (total[before] if before else 0) + last_steps.get(stage.name, stage.steps)
        folder = run / stage.name / "model"
        if (folder / "config.json").is_file():
            decoding, source = (
                Decoding(recipe.thinking_of(stage), template_text(recipe.prompt_template)),
                config,
            )
            if (folder / "thinking.json").is_file():
                source = folder / "thinking.json"
                decoding = stored_decoding(source)
            checkpoints.append(Checkpoint(stage.name, folder, decoding, source, total[stage.name]))
    if not checkpoints:
        raise UserError(f"{run}: no stage of this run is done (no <stage>/model)")
    return checkpoints


def choose_checkpoints(
    run: Path | None, stages: Sequence[str] | None, folders: Sequence[Path]
) -> list[Checkpoint]:
    """Chooses the stages of a run (None: all), then single folders, under distinct names.

    Raises:
        UserError: the run lacks a stage, or nothing is chosen.
    """
    checkpoints = stages_of(run) if run is not None else []
    if stages is not None:
        known = [checkpoint.name for checkpoint in checkpoints]
        if missing := [name for name in stages if name not in known]:
            raise UserError(
                f"--stages {missing[0]}: no finished stage of --run; it has {', '.join(known) or 'none'}"
            )
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.name in stages]
    for folder in folders:
        opened = open_checkpoint(folder)
        taken = {checkpoint.name for checkpoint in checkpoints}
        checkpoints.append(opened if opened.name not in taken else replace(opened, name=str(folder)))
    if not checkpoints:
        raise UserError("nothing to compare; give --run RUN, or two --checkpoint or more")
    return checkpoints


def fingerprint(folder: Path) -> str:
    """A hash of the model's weights, config and tokenizer, independent of the folder's name."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in _CONTENT for file in folder.glob(pattern)}):
        default = (CHAT_TEMPLATE, BOS_CHAT_TEMPLATE)
        if file.name == "chat_template.jinja" and file.read_text(encoding="utf-8") in default:
            continue  # A release writes one of them; a tokenizer without a template behaves the same.
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while chunk := data.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def stored_decoding(file: Path) -> Decoding:
    """Reads the decoding settings of a thinking.json.

    Raises:
        UserError: it is invalid.
    """
    values = _read(file)
    known = Thinking.model_fields
    thinking = Thinking.read({k: v for k, v in values.items() if k in known}, str(file))
    template = values.get("prompt_template", TEMPLATES.get(str(values.get("prompt"))))
    try:
        return Decoding(thinking, template_text(template if isinstance(template, str) else ""))
    except UserError:
        raise UserError(
            f"{file}: prompt_template must be a text with {{problem}} in it; correct it or copy it again"
        ) from None


def _stored_step(file: Path) -> int | None:
    step = _read(file).get("step")
    if step is not None and (type(step) is not int or step < 0):
        raise UserError(f"{file}: step must be a number of training steps; correct it or copy it again")
    return step


def _read(file: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object; copy it again")
    return values
