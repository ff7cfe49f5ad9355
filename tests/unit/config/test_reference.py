"""The reference and the schema say of every key what it is; the page in docs/ is current."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_parallel_r1.coldstart.settings import ColdStart
from megatron_parallel_r1.config.recipe import Recipe
from megatron_parallel_r1.config.reference import PAGE, reference
from megatron_parallel_r1.utils.settings import Settings


def keys(settings: type[Settings]) -> Iterator[tuple[str, dict[str, Any]]]:
    schema = settings.model_json_schema()
    for name, section in {settings.__name__: schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        yield from ((f"{name}.{key}", value) for key, value in section["properties"].items())


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run python -m megatron_parallel_r1.config.reference"
    )


@pytest.mark.parametrize("settings", [Recipe, ColdStart])
def test_every_key_is_described_in_a_sentence(settings: type[Settings]) -> None:
    for key, value in keys(settings):
        assert value.get("description", "").endswith("."), key


def test_numbers_of_tokens_steps_and_seconds_have_units() -> None:
    for key, value in keys(Recipe):
        name, shown = key.rpartition(".")[2], json.dumps(value)
        for ending, unit in (
            ("_tokens", "tokens"),
            ("_steps", "steps"),
            ("_s", "seconds"),
            ("_bytes", "bytes"),
        ):
            if name.endswith(ending):
                assert f'"unit": "{unit}"' in shown, key
