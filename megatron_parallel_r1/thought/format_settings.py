"""How a recipe and a `thinking.json` name a format of parallel thinking, or write one of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.thought.formats import FORMATS, MAX_PATHS, PARALLEL_R1, PlanSection, ThinkingFormat
from megatron_parallel_r1.utils.settings import Settings, first_problem

FormatName = Literal["parallel_r1", "multiverse", "npr", "threadweaver"]
Tag = Annotated[str, Field(min_length=1)]


class OwnPlan(Settings):
    """The plan of a format of your own: the policy writes it before the fork."""

    item: Tag
    """Tag that begins an item; each complete item asks for one path."""
    item_end: Tag
    """Tag that ends an item."""
    end: Tag
    """Tag that ends the plan; the engine forks behind it."""
    begin: Tag | None = None
    """Tag that begins the plan; null: the block's opening tag is enough."""


class OwnFormat(Settings):
    """A format of your own: a known one with other values. Each tag becomes one token of the tokenizer."""

    base: FormatName = "parallel_r1"
    """Format whose values hold where this one has none."""
    open: Tag | None = None
    """Tag with which the policy opens a block."""
    close: Tag | None = None
    """Tag that the engine writes behind the paths or the summary; null: none."""
    plan: OwnPlan | None = None
    """Plan before the fork; null: none, and `thinking.paths` sets the number of paths."""
    path: Tag | None = None
    """Tag that begins a path."""
    path_end: Tag | None = None
    """Tag with which the policy ends a path."""
    path_begin: str | None = None
    """Text forced at a path's begin: white space, `path`, any text; `{number}` is the path's, from 1."""
    joined: str | None = None
    """Text forced behind the last path: `close`, the tag `summary`, or both, with white space around them."""
    summary: Tag | None = None
    """Tag that begins the summary; null: none."""
    summary_end: Tag | None = None
    """Tag with which the policy ends the summary; null: none."""
    behind: str = ""
    """Text forced behind the summary: `close`, with white space around it; empty: none."""
    max_paths: Annotated[int, Field(ge=1, le=MAX_PATHS)] = MAX_PATHS
    """Most paths that a plan may ask for."""
    bad_plan: Literal["continue", "end"] = "continue"
    """What a plan of no items, or too many, does: the chain goes on without a fork, or ends."""

    @model_validator(mode="after")
    def _check(self) -> OwnFormat:
        self.format()
        return self

    @model_serializer(mode="wrap")
    def _only_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is not set: null would remove a part of the base."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}

    def format(self) -> ThinkingFormat:
        """The whole format.

        Raises:
            ValueError: its parts contradict one another.
        """
        changes = {name: getattr(self, name) for name in self.model_fields_set - {"base", "plan"}}
        if "plan" in self.model_fields_set:
            changes["plan"] = PlanSection(**dict(self.plan)) if self.plan else None
        return replace(FORMATS[self.base], name="own", **changes)


def _read(setting: Any) -> Any:
    """Reads a name or a mapping, with the errors of the one that it is."""
    if isinstance(setting, OwnFormat) or (isinstance(setting, str) and setting in FORMATS):
        return setting
    if not isinstance(setting, dict):
        raise ValueError(f"unknown format; use {', '.join(FORMATS)}, or a mapping with one of your own")
    try:
        return OwnFormat.model_validate(setting)
    except ValidationError as error:
        raise ValueError(first_problem(error, OwnFormat, setting)) from None


FormatSetting = Annotated[FormatName | OwnFormat, BeforeValidator(_read)]


def stored_format(file: Path) -> ThinkingFormat:
    """Returns the format that a model was trained with, by its thinking.json; without one Parallel-R1.

    Raises:
        UserError: it is none.
    """
    if not file.is_file():
        return PARALLEL_R1
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again") from None
    named = fields.get("format", PARALLEL_R1.name) if isinstance(fields, dict) else PARALLEL_R1.name
    try:
        return format_of(_read(named))
    except ValueError as error:
        raise UserError(f"{file}: format: {error}; copy it again") from None


def format_of(setting: FormatSetting) -> ThinkingFormat:
    """The format that a setting names or describes."""
    return FORMATS[setting] if isinstance(setting, str) else setting.format()
