"""Evaluation modes and the decoding settings of each.

parallel      as stored: the decoding of the training
sequential    no blocks, and a prompt that does not ask for any
majority@k    k sequential responses and a vote
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from megatron_parallel_r1.data.prompts import TEMPLATES
from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.format_settings import format_of
from megatron_parallel_r1.utils.settings import first_problem


@dataclass(frozen=True, slots=True)
class EvaluationMode:
    """`votes` is k of majority@k, 1 for the others."""

    kind: Literal["parallel", "sequential", "majority"]
    votes: int = 1

    @classmethod
    def of(cls, text: str) -> EvaluationMode:
        """Reads `parallel`, `sequential` or `majority@8`.

        Raises:
            UserError: it is not a mode.
        """
        if text == "parallel":
            return cls("parallel")
        if text == "sequential":
            return cls("sequential")
        match = re.fullmatch(r"majority@(\d{1,4})", text)
        if not match or int(match[1]) < 2:
            raise UserError(f"mode {text!r}: unknown, use parallel, sequential or majority@k with k >= 2")
        return cls("majority", int(match[1]))

    def __str__(self) -> str:
        return f"majority@{self.votes}" if self.kind == "majority" else self.kind


@dataclass(frozen=True, slots=True)
class Decoding:
    """Settings of the decoding loop, and the prompt template with `{problem}` in it."""

    thinking: Thinking
    template: str

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.thinking.model_dump(), "template": self.template}


def decoding_of(
    mode: EvaluationMode, stored: Decoding, settings: Sequence[str] = (), prompt: str | None = None
) -> Decoding:
    """The decoding of a checkpoint in `mode`.

    Sequential modes replace a stored prompt that names the tags by the template `sequential`, and keep any
    other. They keep the limits, so that a chain takes no longer than a parallel trace.

    Args:
        settings: `key=value` with keys of `Thinking`; override the stored settings.
        prompt: a template's name, or a text with `{problem}`; overrides the stored prompt.

    Raises:
        UserError: a setting or the prompt is invalid, or the settings contradict the mode.
    """
    thinking, template = stored.thinking, stored.template
    if mode.kind != "parallel":
        thinking = thinking.replace(mode="sequential")
        if any(tag in template for tag in format_of(thinking.format).tags):
            template = TEMPLATES["sequential"]
    thinking = _with(thinking, settings)
    if mode.kind == "parallel" and thinking.mode == "sequential":
        raise UserError(
            "mode parallel: this checkpoint decodes in mode sequential; evaluate it with --mode sequential, "
            "or give one with --set mode=isolated"
        )
    if mode.kind != "parallel" and thinking.mode != "sequential":
        raise UserError(f"--set mode={thinking.mode}: --mode {mode} has no blocks; remove one of the two")
    return Decoding(thinking, template if prompt is None else _template(prompt))


def _with(thinking: Thinking, settings: Sequence[str]) -> Thinking:
    merged: dict[str, Any] = thinking.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in merged or key == "format":
            raise UserError(f"--set {setting!r}: write key=value, with a key of {', '.join(merged)}")
        if key == "paths" and format_of(thinking.format).plan is not None:
            raise UserError(
                f"--set {setting!r}: this model reads the number of paths from its plans; leave it out"
            )
        try:
            merged[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {setting!r}: the value is not valid YAML") from None
    try:
        return Thinking.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"--set {first_problem(error, Thinking)}") from None


def _template(prompt: str) -> str:
    if "{problem}" in prompt:
        return prompt
    if prompt not in TEMPLATES:
        raise UserError(
            f"--prompt {prompt!r}: give a text with {{problem}} in it, or one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[prompt]
